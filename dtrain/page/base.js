// What all scripts of the page share. They stand behind each other in one, and
// ask for nothing outside of the page; uPlot is above, and all data is in #data.
"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const find = (selector, inside = document) => inside.querySelector(selector);
const all = (selector, inside = document) => [
  ...inside.querySelectorAll(selector),
];
const NUM_COLORS = 12;
const DASHES = [[], [6, 3], [2, 3], [8, 3, 2, 3]];
const style = (name) =>
  getComputedStyle(document.documentElement).getPropertyValue(name).trim();
const whole = (number) => Math.round(number).toLocaleString("en");

function short(value) {
  if (value === null || value === undefined) return "";
  const size = Math.abs(value);
  if (size && (size < 1e-3 || size >= 1e6)) return value.toExponential(3);
  return String(Number(value.toPrecision(5)));
}

// What the reader has chosen outlives a reload, as of a page that is watched;
// one that is opened anew begins as it was made.
const KEY = `dtrain ${location.pathname}`;
const memory = (() => {
  try {
    const [how] = performance.getEntriesByType("navigation");
    const kept = how.type === "reload" && sessionStorage.getItem(KEY);
    return JSON.parse(kept || "{}");
  } catch {
    return {};
  }
})();
function remember(name, value) {
  memory[name] = value;
  try {
    sessionStorage.setItem(KEY, JSON.stringify(memory));
  } catch {
    // Where a page of the file system may keep nothing, it starts anew.
  }
}
