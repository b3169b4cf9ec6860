"use strict";
// The knobs: sorted by any column, searched, or only those that differ; and the command to copy.
(() => {
  const table = document.getElementById("knob-table"), body = table.tBodies[0];
  const heads = [...table.tHead.rows[0].cells], rows = [...body.rows];
  const order = new Intl.Collator("en", { numeric: true }).compare;
  const value = (row, column) => row.cells[column].textContent;
  const compare = column => (a, b) => {
    const x = value(a, column), y = value(b, column);
    const [numberX, numberY] = [x, y].map(text => text !== "" && !isNaN(text));
    // Numbers before words, or the order would depend on where it began.
    return numberX && numberY ? x - y : numberX !== numberY ? numberY - numberX : order(x, y);
  };
  heads.forEach((head, column) => head.firstElementChild.addEventListener("click", () => {
    const down = head.getAttribute("aria-sort") === "ascending";
    heads.forEach(other => other.removeAttribute("aria-sort"));
    head.setAttribute("aria-sort", down ? "descending" : "ascending");
    const sorted = [...rows].sort(compare(column));
    body.append(...(down ? sorted.reverse() : sorted));
  }));

  const find = document.getElementById("find"), changed = document.getElementById("changed"), found = document.getElementById("found");
  const filter = () => {
    const words = find.value.toLowerCase().split(/\s+/).filter(Boolean);
    let count = 0;
    for (const row of rows) {
      const text = row.textContent.toLowerCase();
      row.hidden = !words.every(word => text.includes(word)) || (changed.checked && !row.classList.contains("changed"));
      count += !row.hidden;
    }
    found.textContent = count === rows.length ? `${count} knobs` : `${count} of ${rows.length} knobs`;
  };
  find.addEventListener("input", filter);
  changed.addEventListener("change", filter);
  filter();

  const copy = document.getElementById("copy"), command = document.getElementById("command");
  copy.addEventListener("click", async () => {
    try {
      await navigator.clipboard.writeText(command.textContent);
      copy.textContent = "copied";
    } catch {
      getSelection().selectAllChildren(command); // where the clipboard is closed to pages, it is one key away
      copy.textContent = "selected";
    }
    setTimeout(() => { copy.textContent = "copy"; }, 2000);
  });
})();
