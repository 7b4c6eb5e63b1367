// How far something is: a bar with a tick for each step, and a sentence. Ticks that a draft brought along are marked.

import { find, fill, make } from "./dom.js";

const MOST_TICKS = 100;

/** Draws a bar. `kept`: steps that were not computed again; `goal`: where this run ends, if before `total`. */
export function bar(element, { step = 0, total = 0, kept = 0, goal = total }) {
  const ticks = Math.min(total || 1, MOST_TICKS);
  if (element.children.length !== ticks) fill(element, ...Array.from({ length: ticks }, () => make("i")));
  const of = (value) => Math.round((value * ticks) / (total || 1));
  [...element.children].forEach((tick, at) => {
    tick.className = at < of(kept) ? "kept" : at < of(step) ? "done" : at < of(goal) ? "" : "later";
  });
  element.classList.toggle("waits", !total);
  element.setAttribute("aria-valuemax", String(total || 1));
  element.setAttribute("aria-valuenow", String(step));
}

/** A sentence on how far a request is. */
export function sentence({ step, total, position, eta }) {
  const time = eta === null || eta === undefined || eta < 0.5 ? "" : ` · about ${duration(eta)} left`;
  if (position > 0) return `Waiting, ${position} before this${time}`;
  return total ? `Step ${step} of ${total}${time}` : `Starting${time}`;
}

export function duration(seconds) {
  if (seconds < 10) return `${seconds.toFixed(1)} s`;
  if (seconds < 90) return `${Math.round(seconds)} s`;
  const minutes = Math.round(seconds / 60);
  return minutes < 90 ? `${minutes} min` : `${(minutes / 60).toFixed(1)} h`;
}

let said = "";

/** Tells screen readers, each thing once; of steps only every quarter. */
export function announce(text) {
  if (text === said) return;
  said = text;
  find("live").textContent = text;
}

export function announceSteps({ step, total, position }) {
  if (position > 0) return announce(`Waiting, ${position} before this`);
  const quarter = total ? Math.floor((4 * step) / total) : 0;
  if (quarter > 0 && quarter < 4) announce(`${quarter * 25} percent`);
}
