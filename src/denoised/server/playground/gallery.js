// The contact sheet of what was made: newest first, reached by Tab, walked by arrow keys.

import { find, fill, make, moveByKey, rove, show, urlOf } from "./dom.js";
import * as store from "./store.js";

let entries = []; // newest first
let chosen = null;
let hear = { open: () => null, removed: () => null };

/** Loads what was made. `open(entry)`: one was chosen; `removed(entry)`: one is gone. */
export async function start(listeners) {
  hear = listeners;
  find("gallery").onkeydown = onKey;
  entries = (await store.all().catch(() => [])).reverse();
  draw();
}

/** Adds one, and chooses it. Without a database it lasts until the page is left. */
export async function add(entry) {
  const kept = await store.add(entry).catch(() => ({ ...entry, id: -Date.now() }));
  entries.unshift(kept);
  choose(kept);
  return kept;
}

export const byId = (id) => entries.find((entry) => entry.id === id) ?? null;

export function choose(entry) {
  chosen = entry?.id ?? null;
  draw();
}

export async function remove(entry) {
  const at = entries.indexOf(entry);
  entries = entries.filter((other) => other !== entry);
  await store.remove(entry.id).catch(() => null);
  hear.removed(entry);
  draw();
  find("gallery").children[Math.min(at, entries.length - 1)]?.focus();
}

function draw() {
  const focused = document.activeElement?.dataset.id;
  const tiles = entries.map(tile);
  fill(find("gallery"), ...tiles);
  if (tiles.length) rove(tiles, tiles[Math.max(0, entries.findIndex((entry) => entry.id === chosen))]);
  if (focused) tiles.find((one) => one.dataset.id === focused)?.focus();
  show(find("gallery").parentElement, tiles.length > 0);
}

function tile(entry) {
  const says = entry.request.body.prompt ?? entry.request.body.input ?? "";
  const count = entry.blobs.length > 1 ? make("span", { class: "count", textContent: `${entry.blobs.length}` }) : null;
  return make("div", { class: "tile", role: "option", tabIndex: -1, "aria-selected": String(entry.id === chosen),
    "aria-label": `${says}, seed ${entry.receipt?.seed ?? "unknown"}`, title: says, data: { id: entry.id },
    on: { click: () => hear.open(entry) } }, thumb(entry), count);
}

function thumb(entry) {
  const [blob] = entry.blobs;
  if (blob.type.startsWith("image/")) return make("img", { src: urlOf(blob), alt: "", loading: "lazy" });
  if (blob.type.startsWith("video/")) return make("video", { src: urlOf(blob), muted: true, preload: "metadata" });
  return make("span", { class: "sound", textContent: "♪" });
}

function onKey(event) {
  const entry = byId(Number(event.target.dataset.id));
  if (!entry || moveByKey(event, find("gallery"))) return;
  if (event.key === "Enter" || event.key === " ") event.preventDefault(), hear.open(entry);
  if (event.key === "Delete" || event.key === "Backspace") event.preventDefault(), remove(entry);
}
