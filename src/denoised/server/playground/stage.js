// The large part of the page: what is being made, what was made, how two pictures differ, what went wrong.

import { find, fill, make, show, urlOf } from "./dom.js";
import { label } from "./form.js";
import * as progress from "./progress.js";
import { receipt } from "./receipt.js";
import { brief } from "./settings.js";

const ENLARGED = 4; // small pictures are shown larger than they are, up to so many times
const view = () => find("view");

export function empty(info) {
  const words = { image: "pictures", video: "videos", audio: "sound" }[info.kind];
  fill(view(), make("div", { class: "empty" },
    make("div", { class: "grain", "aria-hidden": "true" }, ...Array.from({ length: 64 }, () => make("i"))),
    make("p", { textContent: `${info.model} makes ${words}. Say what, and press Ctrl + Enter.` })));
}

export function alert(message) {
  const element = find("alert");
  element.textContent = message ?? "";
  show(element, Boolean(message));
}

// ---- on its way

/** Scrolls to the result, where it is not in sight: below the form in a narrow window, above the contact sheet. */
export function reveal() {
  const isNarrow = matchMedia("(max-width: 860px)").matches;
  if (isNarrow || find("stage").getBoundingClientRect().top < 0) find("stage").scrollIntoView({ block: "start" });
}

export function begin({ picture = true } = {}) {
  alert(null);
  show(find("running"));
  look({ step: 0, total: 0, position: 0, eta: null });
  if (picture) fill(view(), make("div", { class: "frame blank" }));
  progress.announce("Started");
  reveal();
}

export function look(event) {
  progress.bar(find("bar"), event);
  find("status").textContent = progress.sentence(event);
  find("bar").setAttribute("aria-valuetext", progress.sentence(event));
  progress.announceSteps(event);
}

/** A preview in place of the one before it. */
export function preview(index, blob) {
  let figures = view().querySelector(".previews");
  if (!figures) fill(view(), (figures = make("div", { class: "previews" })));
  while (figures.children.length <= index) figures.append(make("div", { class: "frame blank" }));
  fill(figures.children[index], picture(blob, "preview")).className = "frame soft";
}

export function end() {
  show(find("running"), false);
}

// ---- done

/** One result. `base`: what it was made from by changing `changes`; `acts`: { says: function }. */
export function result(entry, { base = null, changes = [], acts = {} }) {
  const own = make("div", { class: "media" }, ...entry.blobs.map((blob) => make("div", { class: "frame" }, media(blob, entry))));
  const pair = base && changes.length ? compared(base, own, changes) : own;
  const buttons = Object.entries(acts).map(([says, act]) => make("button", { type: "button", textContent: says, on: { click: act } }));
  const links = entry.blobs.map((blob, at) => make("a", { class: "button", href: urlOf(blob), textContent: "Download",
    download: `denoised-${entry.receipt?.seed ?? "x"}-${at + 1}.${blob.type.split("/")[1]}` }));
  fill(view(), pair, make("div", { class: "acts" }, ...links, ...buttons), receipt(entry));
}

function compared(base, own, changes) {
  const before = make("div", { class: "media" }, make("div", { class: "frame" }, media(base.blobs[0], base)));
  const list = changes.map(({ name, from, to }) => make("li", {}, make("b", { textContent: label(name) }),
    make("del", { textContent: brief(from) }), make("span", { "aria-label": "became", textContent: "→" }),
    make("ins", { textContent: brief(to) })));
  return make("div", { class: "compared" }, make("ul", { class: "changes", "aria-label": "What was changed" }, ...list),
    make("figure", {}, before, make("figcaption", { textContent: "before" })),
    make("figure", {}, own, make("figcaption", { textContent: "after" })));
}

function media(blob, entry) {
  if (blob.type.startsWith("video/")) return make("video", { src: urlOf(blob), controls: true, loop: true, muted: true });
  if (blob.type.startsWith("audio/")) return make("audio", { src: urlOf(blob), controls: true });
  return picture(blob, entry.request.body.prompt ?? "");
}

export function picture(blob, alt) {
  const image = make("img", { alt, src: urlOf(blob) });
  const fit = () => image.style.setProperty("--most", `${image.naturalWidth * ENLARGED}px`);
  image.addEventListener("load", fit, { once: true });
  return image;
}
