"use strict";
// Light, dark, or as the system has it; whoever draws on a canvas is told of every change.
const theme = (() => {
  const root = document.documentElement, button = document.getElementById("theme");
  const names = { auto: ["◐", "as the system"], light: ["☀", "light"], dark: ["☾", "dark"] };
  const told = [];
  const changed = () => told.forEach(tell => tell());
  let now = "auto";
  const set = name => {
    now = name;
    if (name === "auto") delete root.dataset.theme; else root.dataset.theme = name;
    button.replaceChildren(names[name][0] + " ", Object.assign(document.createElement("span"), { textContent: name }));
    button.setAttribute("aria-label", "Colours: " + names[name][1]);
    changed();
  };
  button.addEventListener("click", () => {
    const order = Object.keys(names);
    set(order[(order.indexOf(now) + 1) % order.length]);
    // A page opened from a disk may have no storage.
    try { localStorage.setItem("corinfomax-theme", now); } catch { /* then the choice lasts as long as the page */ }
  });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", changed);
  // Paper is white, whatever the screen is.
  addEventListener("beforeprint", () => { root.dataset.theme = "light"; changed(); });
  addEventListener("afterprint", () => set(now));
  let kept = null;
  try { kept = localStorage.getItem("corinfomax-theme"); } catch { /* as above */ }
  if (kept in names) set(kept);
  const probe = document.createElement("span");
  probe.hidden = true;
  document.body.append(probe);
  return {
    onChange: tell => told.push(tell),
    // Canvas does not know var() and light-dark(): let the browser work the colour out.
    colour: name => { probe.style.color = `var(--${name})`; return getComputedStyle(probe).color; },
  };
})();
const data = JSON.parse(document.getElementById("data").textContent);
