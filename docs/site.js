// What scrolls is reached by the keyboard, and what the theme calls alike gets a name of its own.
"use strict";
function mend() {
  document.querySelectorAll(".md-typeset__scrollwrap, .md-typeset p:has(> img)").forEach((box) => { box.tabIndex = 0; });
  const times = new Map();
  document.querySelectorAll(".md-nav .md-nav[aria-label]").forEach((list) => { // a module and its function may have one name
    const name = (list.dataset.name ??= list.getAttribute("aria-label"));
    const key = name.toLowerCase(); // as a screen reader says it
    times.set(key, (times.get(key) ?? 0) + 1);
    if (times.get(key) > 1) list.setAttribute("aria-label", `${name} ${times.get(key)}`);
  });
  document.querySelectorAll(".md-code__nav").forEach((bar, number) => { bar.setAttribute("aria-label", `Code ${number + 1}`); });
}
document.addEventListener("DOMContentLoaded", () => {
  mend();
  new MutationObserver(mend).observe(document.body, { childList: true, subtree: true });
});
