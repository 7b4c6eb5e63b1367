// Fork and pick: a card for each draft; those that are picked go on, the others stay as they are.

import { find, fill, make, moveByKey, rove, show } from "./dom.js";
import { continuation, drafts } from "./making.js";
import * as progress from "./progress.js";
import { picture } from "./stage.js";

let cards = [];

/** Begins `n` pictures; returns when all are drafts. `pick(card)` is called for the one that is picked. */
export async function begin(request, { n, steps, signal, pick }) {
  cards = Array.from({ length: n }, (_, at) => cardOf(at, pick));
  const grid = make("div", { class: "drafts", role: "group", "aria-label": "Drafts", on: { keydown: (e) => moveByKey(e, grid) } },
    ...cards.map((card) => card.element));
  rove([...grid.children], grid.children[0]);
  const hint = make("p", { class: "hint", textContent: "Each draft runs its first steps and waits." });
  fill(find("view"), hint, grid);
  for await (const event of drafts(request, n, steps, signal)) hear(cards[event.index], event);
  hint.textContent = "Pick by click or by number: it goes on from where it is. You may pick several.";
  progress.announce(`${n} drafts are ready to pick`);
  cards[0].element.focus();
}

function cardOf(at, pick) {
  const card = { at, draft: null, state: "begins", frame: make("span", { class: "frame blank" }),
    bar: make("span", { class: "bar" }), says: make("span", { class: "says", textContent: "waiting" }) };
  card.element = make("button", { type: "button", class: "draft", disabled: true, "aria-label": `Draft ${at + 1}`,
    on: { click: () => pick(card) } },
  card.frame, card.bar, make("span", { class: "line" }, make("kbd", { textContent: String(at + 1) }), card.says));
  return card;
}

function hear(card, event) {
  if (event.type === "preview") draw(card, event.blob);
  if (event.type === "progress") {
    const step = Math.min(event.step, event.goal);
    progress.bar(card.bar, { ...event, step });
    card.says.textContent = event.position ? progress.sentence(event) : `${step} of ${event.goal} steps`;
  }
  if (event.type === "draft") ready(card, event.draft);
}

function draw(card, blob) {
  fill(card.frame, picture(blob, "")).className = "frame soft";
}

function ready(card, draft) {
  Object.assign(card, { draft, state: "ready" });
  draw(card, draft.blob);
  progress.bar(card.bar, { step: draft.step, total: draft.total_steps, goal: draft.step });
  says(card, `seed ${draft.seed}`, `Draft ${card.at + 1}, seed ${draft.seed}, ${draft.step} of ${draft.total_steps} steps. Go on with it`);
}

function says(card, text, label) {
  card.says.textContent = text;
  card.element.dataset.state = card.state;
  card.element.disabled = card.state === "begins";
  card.element.setAttribute("aria-label", label);
}

/** Goes on with a card's draft; gives its pictures and receipt. */
export async function goOn(card, signal) {
  const { draft } = card;
  card.state = "runs";
  says(card, "goes on", `Draft ${card.at + 1} goes on`);
  try {
    for await (const event of continuation(draft, signal)) {
      if (event.type === "preview") draw(card, event.blob);
      if (event.type === "progress") further(card, event);
      if (event.type === "done") return done(card, event);
    }
  } catch (error) {
    back(card, error);
    throw error;
  }
}

function further({ bar, says, draft }, event) {
  const step = Math.max(event.step, draft.step);
  progress.bar(bar, { step, kept: draft.step, total: draft.total_steps });
  const time = event.eta ? ` · ${progress.duration(event.eta)}` : "";
  says.textContent = event.position ? progress.sentence(event) : `${step} of ${draft.total_steps}${time}`;
}

function done(card, event) {
  card.state = "done";
  draw(card, event.blobs[0]);
  card.frame.className = "frame";
  progress.bar(card.bar, { step: card.draft.total_steps, total: card.draft.total_steps, kept: card.draft.step });
  says(card, "done, show it", `Draft ${card.at + 1} is done. Show the picture`);
  return event;
}

function back(card, error) {
  ready(card, card.draft);
  if (error.status !== 404) return;
  card.state = "gone";
  says(card, "gone", `Draft ${card.at + 1} is gone from the server`);
  card.element.disabled = true;
}

/** Picks by number, while there are cards; true if there was one. */
export function pickByNumber(number) {
  const card = isShown() ? cards[number - 1] : null;
  if (!card || card.element.disabled) return false;
  card.element.focus();
  card.element.click();
  return true;
}

const isShown = () => cards.length > 0 && cards[0].element.isConnected;
export const isBusy = () => isShown() && cards.some((card) => card.state === "runs");
