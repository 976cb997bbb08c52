// What scrolls is reached by the keyboard, and what the theme calls alike gets a name of its own.
"use strict";
function mend() {
  document.querySelectorAll(".md-typeset__scrollwrap, .md-typeset p:has(> img)").forEach((box) => { box.tabIndex = 0; });
  document.querySelectorAll(".md-code__nav").forEach((bar, number) => { bar.setAttribute("aria-label", `Code ${number + 1}`); });
}
document.addEventListener("DOMContentLoaded", () => {
  mend();
  new MutationObserver(mend).observe(document.body, { childList: true, subtree: true });
});
