// The receipt of a result as a table: what really ran.

import { make } from "./dom.js";
import * as progress from "./progress.js";

export function receipt({ receipt: made, seconds, request }) {
  if (!made) return null;
  const rows = Object.entries(facts(made, seconds)).filter(([, value]) => value)
    .map(([name, value]) => make("div", {}, make("dt", { textContent: name }), make("dd", { textContent: value })));
  const strip = made.resumed_from_step ? [bar(made)] : [];
  return make("section", { class: "receipt", "aria-label": "Receipt" },
    make("p", { class: "asked", textContent: request.body.prompt ?? request.body.input ?? "" }), ...strip,
    make("dl", {}, ...rows),
    make("details", {}, make("summary", { textContent: "Whole receipt" }),
      make("pre", { tabIndex: 0, textContent: JSON.stringify(made, null, 2) })));
}

function bar(made) {
  const element = make("div", { class: "bar", role: "img", "aria-label":
    `Steps up to ${made.resumed_from_step} of ${made.steps} came from the draft` });
  progress.bar(element, { step: made.steps, total: made.steps, kept: made.resumed_from_step });
  return element;
}

function facts(made, seconds) {
  const ranks = made.ranks ?? [];
  return {
    Seed: text(made.seed),
    Steps: made.steps && `${made.steps}${made.resumed_from_step ? `, of which ${made.resumed_from_step} from the draft` : ""}`,
    Took: seconds && progress.duration(seconds),
    Forwards: ranks.map((rank) => rank.forwards).join(" + "),
    "Rows joined": made.rows_joined && String(made.rows_joined),
    "Encoder cache": made.encoder_cache_hits && `${made.encoder_cache_hits} hits`,
    Stages: Object.entries(made.stage_seconds ?? {}).map(([name, value]) => `${name} ${value.toFixed(2)} s`).join(", "),
    Runs: made.dtype && `${made.dtype} on ${made.world_size > 1 ? `${made.world_size} × ` : ""}${made.device}`,
    Memory: made.peak_memory_mb && `${Math.round(made.peak_memory_mb)} MB at most`,
    Notes: (made.notes ?? []).join(" "),
    Ran: made.line,
  };
}

const text = (value) => (value === undefined || value === null ? "" : String(value));
