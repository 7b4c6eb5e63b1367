// Elements from plain data. Text is only ever set as text, so nothing that a model, a prompt or a server says is markup.

export const find = (id) => document.getElementById(id);

/** An element: properties by name, `class` and attributes with dashes by attribute, listeners under `on`. */
export function make(tag, given = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(given)) put(element, name, value);
  element.append(...children.filter((child) => child !== null && child !== undefined));
  return element;
}

function put(element, name, value) {
  if (value === null || value === undefined || value === false) return;
  if (name === "on") for (const [event, hear] of Object.entries(value)) element.addEventListener(event, hear);
  else if (name === "data") Object.assign(element.dataset, value);
  else if (name in element && !["class", "role", "list"].includes(name)) element[name] = value;
  else element.setAttribute(name, value);
}

/** In place of what was there. */
export function fill(element, ...children) {
  element.replaceChildren(...children.filter((child) => child !== null && child !== undefined));
  return element;
}

export function show(element, isShown = true) {
  element.hidden = !isShown;
  return element;
}

const urls = new WeakMap();
const unused = new FinalizationRegistry((url) => URL.revokeObjectURL(url));

/** A URL for a blob, the same for the same blob, as long as somebody has the blob. */
export function urlOf(blob) {
  if (!urls.has(blob)) {
    urls.set(blob, URL.createObjectURL(blob));
    unused.register(blob, urls.get(blob));
  }
  return urls.get(blob);
}

/** Moves the focus among the children of a grid by arrow keys, Home and End; true if the key was one of those. */
export function moveByKey(event, grid) {
  const items = [...grid.children];
  const at = items.indexOf(document.activeElement);
  if (at < 0) return false;
  const columns = items.filter((item) => item.offsetTop === items[0].offsetTop).length;
  const moves = { ArrowLeft: at - 1, ArrowRight: at + 1, ArrowUp: at - columns, ArrowDown: at + columns,
    Home: 0, End: items.length - 1 };
  if (!(event.key in moves)) return false;
  const target = items[moves[event.key]];
  event.preventDefault();
  if (target) rove(items, target), target.focus();
  return true;
}

/** One of many is reached by Tab. */
export function rove(items, target) {
  for (const item of items) item.tabIndex = item === target ? 0 : -1;
}
