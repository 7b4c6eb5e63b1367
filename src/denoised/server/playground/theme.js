// Light, dark, or as the system has it; remembered in this browser.

import { find } from "./dom.js";

const KEY = "denoised-theme";
const ORDER = ["auto", "light", "dark"];

function apply(theme) {
  document.documentElement.dataset.theme = theme;
  find("theme").textContent = `Theme: ${theme}`;
  localStorage.setItem(KEY, theme);
}

find("theme").addEventListener("click", () => {
  const now = document.documentElement.dataset.theme;
  apply(ORDER[(ORDER.indexOf(now) + 1) % ORDER.length]);
});

apply(ORDER.includes(localStorage.getItem(KEY)) ? localStorage.getItem(KEY) : "auto");
