"use strict";
// Light, dark or the system's colours; scripts that draw on a canvas hear of every change.
const theme = (() => {
  const root = document.documentElement, button = document.getElementById("theme");
  const names = { auto: ["◐", "system"], light: ["☀", "light"], dark: ["☾", "dark"] };
  const listeners = [];
  const changed = () => listeners.forEach(listener => listener());
  let choice = "auto";
  const set = name => {
    choice = name;
    if (name === "auto") delete root.dataset.theme; else root.dataset.theme = name;
    button.replaceChildren(names[name][0] + " ", Object.assign(document.createElement("span"), { textContent: name }));
    button.setAttribute("aria-label", "Colour scheme: " + names[name][1]);
    changed();
  };
  button.addEventListener("click", () => {
    const order = Object.keys(names);
    set(order[(order.indexOf(choice) + 1) % order.length]);
    // A page opened from a file may have no storage; the choice then lasts as long as the page.
    try { localStorage.setItem("corinfomax-theme", choice); } catch { /* no storage */ }
  });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", changed);
  // Print on white paper with dark ink.
  addEventListener("beforeprint", () => { root.dataset.theme = "light"; changed(); });
  addEventListener("afterprint", () => set(choice));
  let stored = null;
  try { stored = localStorage.getItem("corinfomax-theme"); } catch { /* no storage */ }
  if (stored in names) set(stored);
  const probe = document.createElement("span");
  probe.hidden = true;
  document.body.append(probe);
  return {
    onChange: listener => listeners.push(listener),
    // A canvas does not know var() and light-dark(): let the browser compute the colour.
    colour: name => { probe.style.color = `var(--${name})`; return getComputedStyle(probe).color; },
  };
})();
const data = JSON.parse(document.getElementById("data").textContent);
