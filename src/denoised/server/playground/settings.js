// What two requests have in common and what not.

/** Settings by name, objects in them by `outer.inner`. */
function flat(body, prefix = "") {
  return Object.entries(body).flatMap(([name, value]) =>
    value !== null && typeof value === "object" && !Array.isArray(value)
      ? flat(value, `${prefix}${name}.`) : [[prefix + name, value]]);
}

/** What differs: [{ name, from, to }], undefined where a request does not say. `known` gives defaults by name. */
export function changes(before, after, known = () => undefined) {
  const [old, fresh] = [Object.fromEntries(flat(before.body)), Object.fromEntries(flat(after.body))];
  const said = (values, name) => values[name] ?? known(name);
  const names = [...new Set([...Object.keys(old), ...Object.keys(fresh)])];
  const found = names.filter((name) => JSON.stringify(said(old, name)) !== JSON.stringify(said(fresh, name)))
    .map((name) => ({ name, from: said(old, name), to: said(fresh, name) }));
  if (uploadsDiffer(before, after)) found.push({ name: "input pictures", from: before.inputs?.length ?? 0, to: after.inputs?.length ?? 0 });
  return found;
}

function uploadsDiffer(before, after) {
  const sizes = ({ inputs = [], mask = null }) => JSON.stringify([...inputs.map((blob) => blob.size), mask?.size]);
  return sizes(before) !== sizes(after);
}

/** A setting as a few words. */
export function brief(value) {
  if (value === undefined) return "auto";
  const text = typeof value === "string" ? value : JSON.stringify(value);
  return text.length > 60 ? `${text.slice(0, 57)}…` : text;
}
