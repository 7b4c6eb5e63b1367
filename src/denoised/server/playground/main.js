// What the page does: ask the server what the model takes, make things, keep them, compare them.

import { ApiError, ask, key } from "./api.js";
import { find, fill, make, show } from "./dom.js";
import * as form from "./form.js";
import * as forking from "./forking.js";
import * as gallery from "./gallery.js";
import { making } from "./making.js";
import * as progress from "./progress.js";
import { brief, changes } from "./settings.js";
import * as stage from "./stage.js";
import "./theme.js";

const AGAIN = 2000; // milliseconds until a server that is loading is asked again
let info = null;
let base = null; // the picture whose settings are in the form
let shown = null; // the one on the stage
const jobs = new Set();

// ---- starting

async function start() {
  try {
    info = await (await ask("v1/playground")).json();
  } catch (error) {
    if (error.status === 401) return askForKey();
    stage.alert(error.status === 503 ? "The model is being loaded; this page goes on by itself." : error.message);
    return setTimeout(start, AGAIN);
  }
  stage.alert(null);
  find("model").textContent = `${info.model} · ${info.pipeline} · ${info.device}`;
  document.title = `${info.model} · denoised`;
  form.build(info, showChanges);
  show(find("fork"), info.kind === "image");
  find("fork-n").max = String(Math.min(info.max_n, info.max_drafts, 9));
  find("generate").disabled = false;
  stage.empty(info);
  form.focusFirst();
  await gallery.start({ open, removed: (entry) => [base, shown].includes(entry) && open(null) });
  document.documentElement.dataset.ready = "yes";
}

function askForKey() {
  show(find("key-problem"), key.get() !== null);
  key.drop();
  show(find("key-button"));
  find("key-dialog").showModal();
}

find("key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  key.set(find("key").value.trim());
  find("key").value = "";
  find("key-dialog").close();
  start();
});
find("key-button").addEventListener("click", () => (key.drop(), askForKey()));

// ---- making

/** Runs `work` as something that can be cancelled, and says what went wrong with it. */
async function run(work) {
  const job = new AbortController();
  jobs.add(job);
  busy();
  try {
    await work(job.signal);
  } catch (error) {
    job.signal.aborted ? progress.announce("Cancelled") : complain(error);
    return false;
  } finally {
    jobs.delete(job);
    busy();
  }
  return true;
}

function busy() {
  const isBusy = jobs.size > 0;
  find("generate").disabled = find("draft").disabled = isBusy;
  if (!isBusy) stage.end();
}

const cancel = () => jobs.forEach((job) => job.abort());

function complain(error) {
  if (error.status === 401) return askForKey();
  if (!(error instanceof ApiError)) console.error(error);
  stage.alert(error.message);
  if (error.param === "draft_steps") find("fork-steps").focus();
  else if (error.param) form.complain(error.param, error.message);
}

async function generate() {
  const request = jobs.size ? null : form.read();
  if (!request) return;
  const began = performance.now();
  const before = base;
  stage.begin();
  const isMade = await run(async (signal) => {
    for await (const event of making(info, request, signal)) {
      if (event.type === "progress") stage.look(event);
      if (event.type === "preview") stage.preview(event.index, event.blob);
      if (event.type === "done") await keep(request, event, { began, before });
    }
  });
  if (!isMade) restore();
}

/** Puts a result into the gallery, and shows it unless `isShown` is false. */
async function keep(request, { blobs, receipt }, { began, before = null, isShown = true }) {
  const seed = receipt?.seed ?? request.body.seed;
  const made = { ...request, body: { ...request.body, ...(seed === undefined || seed === null ? {} : { seed }) } };
  const parent = before && before.request.body.seed === made.body.seed ? before.id : null;
  const seconds = (performance.now() - began) / 1000;
  const entry = await gallery.add({ request: made, blobs, receipt, seconds, parent, created: Date.now(), model: info.model });
  progress.announce("Done");
  if (isShown) present(entry);
  return entry;
}

function present(entry) {
  shown = entry;
  const parent = entry.parent === null ? null : gallery.byId(entry.parent);
  const changed = parent ? changes(parent.request, entry.request, form.defaultOf) : [];
  stage.result(entry, { base: parent, changes: changed, acts: {
    "Change one thing": () => (open(entry), form.focusFirst()),
    "New seed": () => (open(entry), unseed()),
    Delete: () => gallery.remove(entry),
  } });
}

/** Shows a past result and takes its settings back, with its seed. */
function open(entry) {
  if (jobs.size) return;
  base = entry;
  stage.alert(null);
  gallery.choose(entry);
  shown = entry;
  if (!entry) return stage.empty(info), showChanges();
  form.refill(entry.request);
  present(entry);
  stage.reveal();
  showChanges();
}

function unseed() {
  const { seed, ...body } = base.request.body;
  form.refill({ ...base.request, body });
  base = null;
  showChanges();
}

function restore() {
  base ? present(base) : stage.empty(info);
}

/** What would be changed, while the settings of a past picture are in the form. */
function showChanges() {
  const now = base ? form.peek() : null;
  const isSame = now !== null && now.body.seed === base.request.body.seed;
  show(find("changes"), isSame);
  if (!isSame) return;
  const found = changes(base.request, now, form.defaultOf);
  const chips = found.map(({ name, from, to }) => make("span", { class: "chip", textContent: `${form.label(name)}: ${brief(from)} → ${brief(to)}` }));
  const says = found.length ? "Same seed, changed:" : `Seed ${base.request.body.seed} is kept. Change one thing.`;
  fill(find("changes"), make("span", { textContent: says }), ...chips);
}

// ---- fork and pick

async function fork() {
  const n = Number(find("fork-n").value);
  const request = jobs.size || !find("fork-n").reportValidity() || !find("fork-steps").reportValidity() ? null : form.read();
  if (!request) return;
  delete request.body.n;
  const steps = Number(find("fork-steps").value) || null;
  stage.begin({ picture: false });
  find("status").textContent = `Making ${n} drafts`;
  const isMade = await run((signal) => forking.begin(request, { n, steps, signal, pick: (card) => pick(card, request) }));
  if (!isMade) restore();
}

async function pick(card, request) {
  if (card.state === "done") return open(card.entry);
  if (card.state !== "ready") return;
  const began = performance.now();
  stage.begin({ picture: false });
  find("status").textContent = `Going on with draft ${card.at + 1}`;
  await run(async (signal) => {
    const event = await forking.goOn(card, signal);
    const body = { ...request.body, seed: card.draft.seed };
    card.entry = await keep({ ...request, body }, event, { began, isShown: false });
  });
}

// ---- keys

find("form").addEventListener("submit", (event) => (event.preventDefault(), generate()));
find("draft").addEventListener("click", fork);
find("cancel").addEventListener("click", cancel);
document.addEventListener("keydown", (event) => {
  if (find("key-dialog").open) return;
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) event.preventDefault(), generate();
  if (event.key === "Escape") cancel();
  const isTyping = event.target.matches("input, textarea, select");
  if (/^[1-9]$/.test(event.key) && !isTyping && !event.ctrlKey && !event.metaKey && !event.altKey) forking.pickByNumber(Number(event.key));
});

start();
