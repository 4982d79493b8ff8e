// @ts-check
// Conversations in the browser's own database. Where there is none (some private windows), they live as long as the page.

/** @type {Promise<IDBDatabase | null> | null} */
let opening = null;
const memory = new Map();

function database() {
  opening ??= new Promise((resolve) => {
    try {
      const request = indexedDB.open("rorqual", 1);
      request.onupgradeneeded = () => request.result.createObjectStore("conversations", { keyPath: "id" });
      request.onsuccess = () => resolve(request.result);
      request.onerror = request.onblocked = () => resolve(null);
    } catch {
      resolve(null);
    }
  });
  return opening;
}

/**
 * @param {IDBTransactionMode} mode
 * @param {(store: IDBObjectStore) => IDBRequest} act
 * @returns {Promise<any>}
 */
async function within(mode, act) {
  const open = await database();
  if (!open) return undefined;
  return new Promise((resolve, reject) => {
    const request = act(open.transaction("conversations", mode).objectStore("conversations"));
    request.onsuccess = () => resolve(request.result);
    request.onerror = () => reject(request.error);
  });
}

/** Whether conversations outlive the page. */
export const lasting = async () => (await database()) !== null;

/** All conversations, the latest first. @returns {Promise<any[]>} */
export async function all() {
  const found = (await within("readonly", (store) => store.getAll())) ?? [...memory.values()];
  return found.sort((/** @type {any} */ a, /** @type {any} */ b) => b.updated - a.updated);
}

/** @param {any} conversation */
export async function save(conversation) {
  if (await lasting()) await within("readwrite", (store) => store.put(conversation));
  else memory.set(conversation.id, conversation);
}

/** @param {string} id */
export async function remove(id) {
  memory.delete(id);
  await within("readwrite", (store) => store.delete(id));
}

/** A small thing to remember between visits. @param {string} name @param {any} fallback */
export function recall(name, fallback) {
  try {
    return JSON.parse(localStorage.getItem(name) ?? "null") ?? fallback;
  } catch {
    return fallback;
  }
}

/** @param {string} name @param {any} value */
export function keep(name, value) {
  try {
    localStorage.setItem(name, JSON.stringify(value));
  } catch {
    // it is forgotten, then
  }
}
