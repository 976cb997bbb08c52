// The page asks for itself again, and takes over what has changed: so that focus, scrolling and open lists stay as they are.
"use strict";
const EVERY_MS = 2000;
const names = (page) => [...page.querySelectorAll("[data-part]")].map((part) => part.dataset.part).join();
const seen = new Map();

async function look() {
  let fresh = null;
  try {
    const answer = await fetch(location.href, { cache: "no-store" });
    if (answer.ok) fresh = new DOMParser().parseFromString(await answer.text(), "text/html");
  } catch { /* the command has ended: the page says so below */ }
  document.getElementById("lost").hidden = fresh !== null;
  if (fresh !== null) {
    document.title = fresh.title;
    if (names(fresh) !== names(document)) {
      document.querySelector("main").replaceWith(fresh.querySelector("main"));
      seen.clear();
    }
    for (const part of document.querySelectorAll("[data-part]")) {
      const text = fresh.querySelector(`[data-part="${part.dataset.part}"]`)?.innerHTML;
      if (text !== undefined && text !== seen.get(part.dataset.part)) part.innerHTML = text;
      seen.set(part.dataset.part, text);
    }
  }
  setTimeout(look, document.hidden ? 5 * EVERY_MS : EVERY_MS);
}

setTimeout(look, EVERY_MS);
