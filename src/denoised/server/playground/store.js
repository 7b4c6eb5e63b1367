// What was made, in this browser: settings, receipts and files survive a reload. The oldest make room.

const MOST = 300;
let opening = null;

function database() {
  opening ??= new Promise((resolve, reject) => {
    const request = indexedDB.open("denoised", 1);
    request.onupgradeneeded = () => request.result.createObjectStore("made", { keyPath: "id", autoIncrement: true });
    request.onsuccess = () => resolve(request.result);
    request.onerror = () => reject(request.error);
  });
  return opening;
}

async function within(mode, act) {
  const made = (await database()).transaction("made", mode).objectStore("made");
  return new Promise((resolve, reject) => {
    const request = act(made);
    request.onsuccess = () => resolve(request.result);
    request.onerror = () => reject(request.error);
  });
}

/** Everything, oldest first. */
export const all = () => within("readonly", (made) => made.getAll());

/** Adds one; gives it with its id. */
export async function add(entry) {
  const id = await within("readwrite", (made) => made.add(entry));
  const keys = await within("readonly", (made) => made.getAllKeys());
  for (const old of keys.slice(0, Math.max(0, keys.length - MOST))) await remove(old);
  return { ...entry, id };
}

export const remove = (id) => within("readwrite", (made) => made.delete(id));
