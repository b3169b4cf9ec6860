"use strict";
// The map: each image is a point on a canvas; pointing, tapping or the arrow keys show one.
(() => {
  const map = data.map, canvas = document.getElementById("canvas"), context = canvas.getContext("2d");
  const tip = document.getElementById("tip"), status = document.getElementById("status"), legend = document.getElementById("legend");
  const bytes = text => Uint8Array.from(atob(text), c => c.charCodeAt(0));
  const layouts = map.layouts.map(layout => {
    const xy = new Uint16Array(bytes(layout.xy).buffer);
    const rows = layout.rows ? new Uint32Array(bytes(layout.rows).buffer) : Uint32Array.from({ length: map.images }, (_, i) => i);
    return { ...layout, xy, rows };
  });
  const labels = map.labels && new Uint16Array(bytes(map.labels).buffer);
  const means = bytes(map.colours);
  const thumbnail = new Map(Array.from(new Uint32Array(bytes(map.thumbnail_rows).buffer), (row, i) => [row, i]));
  let names = null;
  new Response(new Blob([bytes(map.names)]).stream().pipeThrough(new DecompressionStream("gzip"))).json()
    .then(read => { names = read; });

  const groups = labels ? map.classes : map.splits.map(split => split.name);
  const split = row => map.splits.findIndex(s => row < s.end);
  const group = row => labels ? labels[row] : split(row);
  // Few groups get evenly spaced hues; of many, neighbours lie a golden angle apart.
  const hue = i => groups.length <= 12 ? 360 * i / groups.length + 20 : i * 137.508;
  const dark = () => getComputedStyle(canvas).colorScheme === "dark" ||
    (getComputedStyle(canvas).colorScheme !== "light" && matchMedia("(prefers-color-scheme: dark)").matches && !matchMedia("print").matches);
  const tint = i => `hsl(${hue(i) % 360} ${60 + 15 * (i % 2)}% ${(dark() ? 62 : 42) + 8 * (Math.floor(i / 2) % 2)}%)`;

  const state = { layout: layouts.length > 1 ? 1 : 0, colour: labels ? "group" : "image", zoom: 1, x: 0.5, y: 0.5, row: null };
  const shown = new Set(groups.keys());
  let width = 0, height = 0, pending = null;

  function frame() {
    const side = Math.min(width, height) * 0.94 * state.zoom;
    return { side, left: width / 2 - state.x * side, top: height / 2 - state.y * side };
  }

  function draw() {
    pending = null;
    const scale = devicePixelRatio || 1;
    width = canvas.clientWidth; height = canvas.clientHeight;
    canvas.width = Math.round(width * scale); canvas.height = Math.round(height * scale);
    context.setTransform(scale, 0, 0, scale, 0, 0);
    const { xy, rows } = layouts[state.layout], { side, left, top } = frame();
    const size = Math.max(1.6, Math.min(7, 260 / Math.sqrt(rows.length) * Math.sqrt(state.zoom)));
    context.globalAlpha = rows.length > 5000 ? 0.7 : 0.85;
    const tints = groups.map((_, i) => tint(i));
    // By a fixed stride, so that no group lies on top of all others.
    const stride = coprime(rows.length);
    for (let k = 0, i = 0; k < rows.length; k++, i = (i + stride) % rows.length) {
      const row = rows[i];
      if (!shown.has(group(row))) continue;
      const x = left + xy[2 * i] / 65535 * side, y = top + (1 - xy[2 * i + 1] / 65535) * side;
      if (x < -9 || y < -9 || x > width + 9 || y > height + 9) continue;
      context.fillStyle = state.colour === "image" ? `rgb(${means[3 * row]} ${means[3 * row + 1]} ${means[3 * row + 2]})` : tints[group(row)];
      if (size < 3.5) context.fillRect(x - size / 2, y - size / 2, size, size);
      else { context.beginPath(); context.arc(x, y, size / 2, 0, 7); context.fill(); }
    }
    context.globalAlpha = 1;
    if (state.row !== null) ring();
  }

  function coprime(n) {
    const gcd = (a, b) => b ? gcd(b, a % b) : a;
    let stride = Math.max(1, Math.round(n * 0.618));
    while (gcd(n, stride) !== 1) stride++;
    return stride;
  }

  function later() { pending ??= requestAnimationFrame(draw); }

  function position(row) {
    const { xy, rows } = layouts[state.layout], i = rows.length === map.images ? row : rows.indexOf(row);
    if (i < 0) return null;
    const { side, left, top } = frame();
    return [left + xy[2 * i] / 65535 * side, top + (1 - xy[2 * i + 1] / 65535) * side];
  }

  function ring() {
    const at = position(state.row);
    if (!at) return;
    context.lineWidth = 2.5;
    context.strokeStyle = theme.colour("ink");
    context.beginPath(); context.arc(at[0], at[1], 7, 0, 7); context.stroke();
  }

  // The nearest point with a thumbnail within reach of (x, y), else the nearest point.
  function hit(x, y, reach) {
    const { xy, rows } = layouts[state.layout], { side, left, top } = frame();
    let best = null, bestSquare = reach * reach, any = null, anySquare = reach * reach;
    for (let i = 0; i < rows.length; i++) {
      const dx = left + xy[2 * i] / 65535 * side - x, dy = top + (1 - xy[2 * i + 1] / 65535) * side - y, square = dx * dx + dy * dy;
      if (square >= anySquare && square >= bestSquare || !shown.has(group(rows[i]))) continue;
      if (square < bestSquare && thumbnail.has(rows[i])) { best = rows[i]; bestSquare = square; }
      if (square < anySquare) { any = rows[i]; anySquare = square; }
    }
    return best ?? any;
  }

  function show(row) {
    if (row === state.row && !tip.hidden) return;
    state.row = row;
    tip.hidden = row === null;
    later();
    if (row === null) { status.textContent = ""; return; }
    const at = position(row), name = names ? names[row] : "", kind = labels ? groups[labels[row]] : "";
    const image = tip.querySelector("img"), caption = tip.querySelector("figcaption");
    const place = thumbnail.get(row);
    image.hidden = place === undefined;
    if (place !== undefined) image.src = "data:image/webp;base64," + map.thumbnails[place];
    image.alt = name;
    const bold = Object.assign(document.createElement("b"), { textContent: kind });
    const path = Object.assign(document.createElement("bdi"), { textContent: name });
    caption.replaceChildren(...(kind ? [bold] : []), path, ...(place === undefined ? [document.createElement("br"), "no thumbnail on this page"] : []));
    status.textContent = [kind, name].filter(Boolean).join(" · ");
    const x = at[0] + 16 + 180 > width ? at[0] - 16 - 178 : at[0] + 16;
    tip.style.left = Math.max(0, Math.min(x, width - 178)) + "px";
    tip.style.top = Math.max(0, Math.min(at[1] - 60, height - tip.offsetHeight)) + "px";
  }

  function zoom(factor, x = width / 2, y = height / 2) {
    const before = frame(), next = Math.max(1, Math.min(60, state.zoom * factor));
    const px = (x - before.left) / before.side, py = (y - before.top) / before.side;
    state.zoom = next;
    const side = Math.min(width, height) * 0.94 * next;
    state.x = px + (width / 2 - x) / side; state.y = py + (height / 2 - y) / side;
    if (next === 1) state.x = state.y = 0.5;
    show(null); later();
  }

  const pointers = new Map();
  let moved = false;
  const local = event => { const box = canvas.getBoundingClientRect(); return [event.clientX - box.left, event.clientY - box.top]; };
  canvas.addEventListener("pointerdown", event => { pointers.set(event.pointerId, local(event)); moved = false; if (event.pointerType === "mouse") canvas.setPointerCapture(event.pointerId); });
  canvas.addEventListener("pointermove", event => {
    const at = local(event), from = pointers.get(event.pointerId);
    if (!from) { if (event.pointerType === "mouse") show(hit(...at, 24)); return; }
    const others = [...pointers.entries()].filter(([id]) => id !== event.pointerId);
    if (others.length) {
      const other = others[0][1], span = p => Math.hypot(p[0] - other[0], p[1] - other[1]);
      zoom(span(at) / Math.max(1, span(from)), (at[0] + other[0]) / 2, (at[1] + other[1]) / 2);
      moved = true;
    } else if (moved || Math.hypot(at[0] - from[0], at[1] - from[1]) > 4) {
      const { side } = frame();
      state.x -= (at[0] - from[0]) / side; state.y -= (at[1] - from[1]) / side;
      moved = true; show(null); later();
    } else return;
    pointers.set(event.pointerId, at);
  });
  canvas.addEventListener("pointerup", event => { pointers.delete(event.pointerId); if (!moved) show(hit(...local(event), 32)); });
  canvas.addEventListener("pointercancel", event => pointers.delete(event.pointerId));
  canvas.addEventListener("pointerleave", event => { if (event.pointerType === "mouse" && document.activeElement !== canvas) show(null); });
  // Without Ctrl the wheel scrolls the page.
  canvas.addEventListener("wheel", event => { if (event.ctrlKey || event.metaKey) { event.preventDefault(); zoom(Math.exp(-event.deltaY / 250), ...local(event)); } }, { passive: false });

  const directions = { ArrowRight: [1, 0], ArrowLeft: [-1, 0], ArrowDown: [0, 1], ArrowUp: [0, -1] };
  function walk([wx, wy]) {
    const { rows } = layouts[state.layout];
    const from = state.row !== null && position(state.row);
    if (!from) { show(hit(width / 2, height / 2, 1e6)); return; }
    let best = null, cost = Infinity;
    for (const row of rows.length === map.images ? thumbnail.keys() : rows) {
      if (row === state.row || !shown.has(group(row))) continue;
      const at = position(row), dx = at[0] - from[0], dy = at[1] - from[1];
      const ahead = dx * wx + dy * wy, aside = Math.abs(dx * wy) + Math.abs(dy * wx);
      if (ahead > 0.5 && aside <= 2 * ahead && ahead + 2 * aside < cost && at[0] > 0 && at[1] > 0 && at[0] < width && at[1] < height) { best = row; cost = ahead + 2 * aside; }
    }
    if (best !== null) show(best);
  }
  canvas.addEventListener("keydown", event => {
    if (event.key in directions) walk(directions[event.key]);
    else if (event.key === "+" || event.key === "=") zoom(1.5);
    else if (event.key === "-") zoom(1 / 1.5);
    else if (event.key === "Home" || event.key === "0") zoom(1e-9);
    else if (event.key === "Escape") show(null);
    else return;
    event.preventDefault();
  });
  canvas.addEventListener("blur", () => show(null));
  document.getElementById("nearer").addEventListener("click", () => zoom(1.6));
  document.getElementById("farther").addEventListener("click", () => zoom(1 / 1.6));
  document.getElementById("all").addEventListener("click", () => zoom(1e-9));

  function choices(id, entries, initial, choose) {
    const box = document.getElementById(id);
    if (entries.length < 2) return;
    for (const [value, text] of entries) {
      const button = Object.assign(document.createElement("button"), { type: "button", textContent: text });
      button.setAttribute("aria-pressed", value === initial);
      button.addEventListener("click", () => {
        for (const other of box.children) other.setAttribute("aria-pressed", other === button);
        choose(value); show(null); later();
      });
      box.append(button);
    }
  }
  const layoutCaption = document.getElementById("caption");
  const showCaption = () => { layoutCaption.textContent = layouts[state.layout].caption; };
  choices("layout", layouts.map((layout, i) => [i, layout.name]), state.layout, i => { state.layout = i; showCaption(); });
  choices("colour", [...(labels ? [["group", "class"]] : []), ["image", "image colour"], ...(!labels && groups.length > 1 ? [["group", "split"]] : [])],
    state.colour, name => { state.colour = name; });
  showCaption();

  // A click hides or shows a group; with Shift it shows that group alone, or all again. Hiding the last group shows all.
  function fillLegend() {
    if (groups.length < 2) return;
    legend.replaceChildren(...groups.map((name, i) => {
      const dot = document.createElement("i");
      dot.style.background = tint(i);
      const button = Object.assign(document.createElement("button"), { type: "button", title: "click to hide or show, Shift-click to show alone" });
      button.append(dot, Object.assign(document.createElement("bdi"), { textContent: name }));
      button.setAttribute("aria-pressed", shown.has(i));
      button.addEventListener("click", event => {
        if (event.shiftKey) { const alone = shown.size === 1 && shown.has(i); shown.clear(); for (const j of groups.keys()) if (alone || j === i) shown.add(j); }
        else if (shown.has(i)) { shown.delete(i); if (!shown.size) for (const j of groups.keys()) shown.add(j); }
        else shown.add(i);
        [...legend.children].forEach((other, j) => other.setAttribute("aria-pressed", shown.has(j)));
        show(null); later();
      });
      return button;
    }));
  }
  fillLegend();
  theme.onChange(() => { fillLegend(); draw(); });
  new ResizeObserver(later).observe(canvas);
  draw();
  canvas.dataset.ready = "yes";
})();
