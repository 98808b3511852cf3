/** Elements of the page. Every text becomes a text node, so nothing that was written elsewhere is read as markup. */

/** Return the element of the page with this id. */
export const byId = (id) => document.getElementById(id);

/**
 * Build an element.
 * @param {string} tag
 * @param {Object} attributes Attributes by name; those that are false, null or undefined are left out.
 * @param {...(Node|string|null|undefined)} children Texts and elements; empty ones are left out.
 */
export function make(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (value !== false && value !== null && value !== undefined) {
      element.setAttribute(name, value === true ? "" : value);
    }
  }
  element.append(...children.filter((child) => child !== null && child !== undefined && child !== ""));
  return element;
}

let last = 0;

/** Return an id that no other element has. */
export const newId = (prefix) => `${prefix}-${(last += 1)}`;
