// The form of a request, made from the JSON Schema of what the model takes. Knows no model by name.

import { find, make, fill, urlOf } from "./dom.js";

const TEXTS = ["prompt", "input", "negative_prompt"];
const FRONT = ["width", "height", "num_frames", "fps", "audio_length", "num_inference_steps", "n", "strength", "seed"];
const MOST_SEED = Number.MAX_SAFE_INTEGER; // what a number of JSON holds in every browser
const LABELS = { n: "Pictures", num_inference_steps: "Steps", num_frames: "Frames", input: "Prompt", fps: "Frames a second" };

let fields = new Map(); // name -> { schema, input, path }
let uploads = null;

export const label = (name) => {
  const last = name.split(".").pop();
  return LABELS[last] ?? last[0].toUpperCase() + last.slice(1).replaceAll("_", " ").replace("cfg", "CFG");
};

/** Builds the form; `changed` is called whenever something in it is. */
export function build(info, changed) {
  fields = new Map();
  const { extra_args: extra, ...plain } = info.options.properties;
  const all = { ...plain };
  for (const [name, schema] of Object.entries(extra?.properties ?? {})) all[`extra_args.${name}`] = schema;
  if (all.seed) all.seed.maximum = Math.min(all.seed.maximum, MOST_SEED);
  const multiples = { width: info.size_multiple, height: info.size_multiple };
  for (const [name, schema] of Object.entries(all)) fields.set(name, fieldOf(name, { ...schema, multiple: multiples[name] }));
  const names = [...fields.keys()];
  const front = names.filter((name) => isFront(name, all[name]));
  const texts = TEXTS.filter((name) => fields.has(name));
  const rest = names.filter((name) => !front.includes(name) && !texts.includes(name));
  front.sort((a, b) => place(a) - place(b));
  uploads = info.takes_image ? uploadsOf(info, changed) : null;
  const rows = (some) => some.map((name) => fields.get(name).row);
  fill(find("fields"), ...rows(texts), uploads?.row, make("div", { class: "numbers" }, ...rows(front)), moreOf(rows(rest)));
  find("form").oninput = changed;
}

const guides = (name) => /guidance_scale|cfg_scale/.test(name);
const isFront = (name, schema) => FRONT.includes(name) || (guides(name) && schema.default !== undefined);
const place = (name) => (guides(name) ? FRONT.indexOf("n") - 0.5 : FRONT.indexOf(name));

function moreOf(rows) {
  if (!rows.length) return null;
  return make("details", { class: "more" }, make("summary", { textContent: "More options" }),
    make("div", { class: "numbers" }, ...rows));
}

function fieldOf(name, schema) {
  const id = `f-${name.replaceAll(".", "-")}`;
  const input = inputOf(name, schema, id);
  const problem = make("span", { class: "problem", id: `${id}-problem`, hidden: true });
  input.setAttribute("aria-describedby", problem.id);
  const random = make("button", { type: "button", class: "inside", textContent: "Random",
    title: "A new seed each time", on: { click: () => put(input, "") } });
  const row = make("div", { class: "field" },
    make("label", { htmlFor: id, textContent: label(name), title: schema.description ?? "" }),
    name === "seed" ? random : null, input, problem);
  return { schema, input, row, problem, path: name.split(".") };
}

function inputOf(name, schema, id) {
  const common = { id, name };
  if (TEXTS.includes(name)) return make("textarea", { ...common, rows: 1, class: name === "negative_prompt" ? "" : "tall",
    required: name !== "negative_prompt", placeholder: name === "negative_prompt" ? "what to keep out" : "what to make" });
  const hint = schema.default === undefined ? (name === "seed" ? "random" : name === "n" ? "1" : "auto") : String(schema.default);
  const choices = schema.type === "boolean" ? ["true", "false"] : schema.enum;
  if (choices) return make("select", common, make("option", { value: "", textContent: hint }),
    ...choices.map((choice) => make("option", { value: choice, textContent: choice })));
  if (schema.type !== "integer" && schema.type !== "number") return make("input", { ...common, placeholder: hint });
  const low = schema.multiple ?? schema.minimum;
  const step = schema.multiple ?? (schema.type === "integer" ? 1 : "any");
  return make("input", { ...common, type: "number", inputMode: "decimal", placeholder: hint, min: low, max: schema.maximum, step });
}

function put(input, value) {
  input.value = value;
  input.dispatchEvent(new Event("input", { bubbles: true }));
}

// ---- uploads

function uploadsOf(info, changed) {
  const held = { image: [], mask: null };
  const shown = make("div", { class: "uploaded" });
  const redraw = () => {
    const remove = (take) => () => (take(), redraw());
    const one = (blob, says, take) => make("button", { type: "button", class: "thumb", title: `Remove ${says}`,
      "aria-label": `Remove ${says}`, on: { click: remove(take) } }, make("img", { src: urlOf(blob), alt: says }));
    const images = held.image.map((blob, at) => one(blob, `input ${at + 1}`, () => held.image.splice(at, 1)));
    fill(shown, ...images, held.mask && one(held.mask, "mask", () => (held.mask = null)));
    changed();
  };
  const add = (files) => (held.image.push(...[...files].filter((file) => file.type.startsWith("image/"))), redraw());
  const picker = (says, many, take) => make("label", { class: "pick", textContent: says },
    make("input", { type: "file", accept: "image/png,image/jpeg,image/webp", multiple: many, class: "unseen",
      "aria-label": says, on: { change: ({ target }) => (take(target.files), (target.value = ""), redraw()) } }));
  const row = make("div", { class: "drop", on: {
    dragover: (event) => event.preventDefault(),
    drop: (event) => (event.preventDefault(), add(event.dataTransfer.files)),
  } }, picker(info.needs_image ? "Add a picture (needed)" : "Add a picture", info.kind === "image", add),
  info.takes_mask ? picker("Add a mask", false, ([file]) => (held.mask = file ?? null)) : null, shown);
  return { row, held, redraw };
}

// ---- values

/** What is asked: { body, inputs, mask }; null, with the fields marked, if something is not as it must be. */
export function read() {
  clearProblems();
  const bad = [...fields.values()].find(({ input }) => !input.checkValidity());
  if (bad) return complain(bad.path.join("."), bad.input.validationMessage), null;
  return peek();
}

/** The same, as it is at the moment. */
export function peek() {
  const body = {};
  for (const { input, schema, path } of fields.values()) {
    const text = input.value.trim();
    if (text === "") continue;
    const at = path.length > 1 ? (body[path[0]] ??= {}) : body;
    at[path.at(-1)] = valueOf(text, schema);
  }
  return { body, inputs: [...(uploads?.held.image ?? [])], mask: uploads?.held.mask ?? null };
}

function valueOf(text, schema) {
  if (schema.type === "integer" || schema.type === "number") return Number(text);
  if (schema.type === "boolean") return text === "true";
  if (schema.type === "array") return text.replace(/[[\]]/g, "").split(/[\s,]+/).filter(Boolean).map(Number);
  if (schema.type === "string") return text;
  try {
    return JSON.parse(text);
  } catch {
    return text;
  }
}

/** Puts a request back into the form. */
export function refill({ body, inputs = [], mask = null }) {
  clearProblems();
  for (const { input, path } of fields.values()) {
    const value = path.reduce((at, name) => at?.[name], body);
    input.value = value === undefined || value === null ? "" : typeof value === "object" ? JSON.stringify(value) : String(value);
  }
  if (!uploads) return;
  Object.assign(uploads.held, { image: [...inputs], mask });
  uploads.redraw();
}

/** Marks the field that an error is about; false if there is none. */
export function complain(name, message) {
  const field = fields.get(name) ?? fields.get({ size: "width", image: "prompt" }[name] ?? "");
  if (!field) return false;
  field.input.closest("details")?.setAttribute("open", "");
  field.input.setAttribute("aria-invalid", "true");
  field.problem.textContent = message;
  field.problem.hidden = false;
  field.input.focus();
  return true;
}

export function clearProblems() {
  for (const { input, problem } of fields.values()) {
    input.removeAttribute("aria-invalid");
    problem.hidden = true;
  }
}

export const defaultOf = (name) => fields.get(name)?.schema.default;
export const focusFirst = () => find("fields").querySelector("textarea")?.focus();
