/** The picture: taken from a file, a camera, the clipboard or a drop, and made small enough to be sent. */

import { byId } from "./dom.js";

const LONGEST_SIDE = 1600; // pixels; more than any vision tower sees
const SENT_AS_IT_IS = ["image/jpeg", "image/png", "image/webp"];
const MOST_BYTES = 4 * 2 ** 20;

/** A picture that is ready to be sent. */
export class Picture {
  /** @param {Blob} blob @param {string} data The same as a `data:` URL. @param {string} name */
  constructor(blob, data, name) {
    this.data = data;
    this.name = name;
    this.address = URL.createObjectURL(blob);
  }

  /** Free the memory of the picture that is shown. */
  release() {
    URL.revokeObjectURL(this.address);
  }
}

/**
 * Read a picture, and make it smaller if it is large.
 * @param {File|Blob} file
 * @returns {Promise<Picture>}
 * @throws {Error} The file is no picture that this browser can read.
 */
export async function readPicture(file) {
  const name = file.name || "The picture";
  let bitmap;
  try {
    bitmap = await createImageBitmap(file, { imageOrientation: "from-image" });
  } catch {
    throw new Error(`${name} is not a picture that this browser can read. Choose a JPEG, PNG or WebP file.`);
  }
  const scale = Math.min(1, LONGEST_SIDE / Math.max(bitmap.width, bitmap.height));
  const fits = scale === 1 && file.size <= MOST_BYTES && SENT_AS_IT_IS.includes(file.type);
  const blob = fits ? file : await drawn(bitmap, scale, file.type);
  bitmap.close();
  return new Picture(blob, await dataUrl(blob), name);
}

/** Return a bitmap as a file: PNG if it was one, since that loses nothing, else JPEG. */
async function drawn(bitmap, scale, type) {
  const canvas = document.createElement("canvas");
  canvas.width = Math.max(1, Math.round(bitmap.width * scale));
  canvas.height = Math.max(1, Math.round(bitmap.height * scale));
  const context = canvas.getContext("2d");
  context.imageSmoothingQuality = "high";
  context.drawImage(bitmap, 0, 0, canvas.width, canvas.height);
  const as = (kind) => new Promise((resolve) => canvas.toBlob(resolve, kind, 0.92));
  const png = type === "image/png" ? await as("image/png") : null;
  return png && png.size <= MOST_BYTES ? png : as("image/jpeg");
}

function dataUrl(blob) {
  return new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.onload = () => resolve(reader.result);
    reader.onerror = () => reject(new Error("The picture cannot be read. Choose it again."));
    reader.readAsDataURL(blob);
  });
}

/**
 * Call `onFile` with each file that the reader chooses, photographs, pastes or drops anywhere on the page.
 * @param {(file: File) => void} onFile
 */
export function takePictures(onFile) {
  for (const id of ["file", "photo"]) {
    const input = byId(id);
    input.addEventListener("change", () => {
      if (input.files.length) onFile(input.files[0]);
      input.value = ""; // so that the same file can be chosen again
    });
  }
  byId("drop").addEventListener("click", () => byId("file").click()); // the button beside it is for keyboards

  document.addEventListener("paste", (event) => {
    const files = [...(event.clipboardData?.files ?? [])];
    if (!files.length) return; // a text, which belongs to the field
    event.preventDefault();
    onFile(files[0]);
  });

  const frame = byId("frame");
  let entered = 0; // a drag enters and leaves every element that it crosses
  const mark = (change) => {
    entered = change ? Math.max(0, entered + change) : 0;
    frame.classList.toggle("over", entered > 0);
  };
  const onDrag = (name, what) => document.addEventListener(name, (event) => {
    if (!event.dataTransfer.types.includes("Files")) return; // a text, which may go into the field
    event.preventDefault();
    what(event.dataTransfer.files);
  });
  onDrag("dragenter", () => mark(1));
  onDrag("dragleave", () => mark(-1));
  onDrag("dragover", () => {});
  onDrag("drop", (files) => {
    mark(0);
    if (files.length) onFile(files[0]);
  });
}
