/** The server's API: the models, and an answer that arrives piece by piece. Knows nothing of the page. */

const KEY = "visprune-key";

/** A refusal, or a failure on the way. The message is meant for the reader. */
export class ApiError extends Error {
  /**
   * @param {string} message Sentences for the reader.
   * @param {number} status HTTP status; 0 where no answer came.
   * @param {number|null} retryAfter Seconds after which to try again.
   * @param {string|null} param Field of the request that is at fault.
   */
  constructor(message, status = 0, retryAfter = null, param = null) {
    super(message);
    Object.assign(this, { status, retryAfter, param });
  }
}

/** Return what the server said about a request that it refused. */
async function refusal(response) {
  const wait = Number.parseInt(response.headers.get("Retry-After") ?? "", 10);
  const seconds = Number.isFinite(wait) ? wait : null;
  let [message, param] = [`The server refused the request with the status ${response.status}.`, null];
  try {
    ({ message, param } = (await response.json()).error);
  } catch {
    // a proxy in between may answer with a page of its own; the status is all there is to say
  }
  if (seconds !== null) {
    const vague = / Try again (later|in a few seconds)\.$/; // the header says when
    message = `${message.replace(vague, "")} Try again in ${seconds === 1 ? "a second" : `${seconds} seconds`}.`;
  }
  return new ApiError(message, response.status, seconds, param);
}

/** Yield the objects of an event stream, up to "[DONE]". */
async function* events(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let buffer = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    buffer = (buffer + value).replaceAll("\r\n", "\n");
    const found = buffer.split("\n\n");
    buffer = found.pop();
    for (const event of found) {
      const lines = event.split("\n").filter((line) => line.startsWith("data:"));
      const data = lines.map((line) => line.slice(5).trimStart()).join("\n");
      if (data === "[DONE]") return;
      if (data) yield JSON.parse(data);
    }
  }
}

/** The API of the server that this page came from. */
export class Api {
  /** @param {(refused: boolean) => Promise<string|null>} askForKey Asks the reader for a key; null for none. */
  constructor(askForKey) {
    this.askForKey = askForKey;
    this.key = sessionStorage.getItem(KEY);
  }

  /** Use a key from now on. It is stored only where the reader asked for that, and only for this tab. */
  useKey(key, stored) {
    this.key = key;
    if (stored) sessionStorage.setItem(KEY, key);
    else sessionStorage.removeItem(KEY);
  }

  async #fetch(path, options = {}) {
    for (;;) {
      const headers = { ...options.headers };
      if (this.key) headers.Authorization = `Bearer ${this.key}`;
      let response;
      try {
        response = await fetch(path, { ...options, headers });
      } catch (error) {
        if (error.name === "AbortError") throw error;
        throw new ApiError("The server cannot be reached. Check that it is running, then try again.");
      }
      if (response.ok) return response;
      const refused = await refusal(response);
      if (response.status !== 401) throw refused;
      if ((await this.askForKey(Boolean(this.key))) === null) {
        throw new ApiError("This server answers only with a key. Try again and give one.", response.status);
      }
    }
  }

  /** Return the models that are served, as `/v1/models` lists them. */
  async models() {
    return (await (await this.#fetch("v1/models")).json()).data;
  }

  /**
   * Ask for an answer.
   * @param {Object} body Body of `/v1/chat/completions`.
   * @param {(text: string) => void} onText Called with the whole text so far.
   * @param {AbortSignal} signal Ends the request; the server then stops to compute.
   * @returns {Promise<{text: string, finish: string, figures: Object}>} figures is the object `visprune`.
   */
  async answer(body, onText, signal) {
    const headers = { "Content-Type": "application/json" };
    const request = { method: "POST", headers, body: JSON.stringify({ ...body, stream: true }), signal };
    const response = await this.#fetch("v1/chat/completions", request);
    const answer = { text: "", finish: null, figures: null };
    try {
      for await (const event of events(response.body)) {
        if (event.error) throw new ApiError(event.error.message);
        const choice = event.choices?.[0];
        if (choice?.delta?.content) onText((answer.text += choice.delta.content));
        answer.finish = choice?.finish_reason ?? answer.finish;
        answer.figures = event.visprune ?? answer.figures;
      }
    } catch (error) {
      if (error instanceof ApiError || error.name === "AbortError") throw error;
      throw new ApiError("The connection ended before the answer was complete. Ask again.");
    }
    if (answer.finish === null) {
      throw new ApiError("The connection ended before the answer was complete. Ask again.");
    }
    return answer;
  }
}
