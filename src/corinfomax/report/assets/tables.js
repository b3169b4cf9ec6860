"use strict";
// The settings, sorted by a column, searched, or only the changes; and the command to copy.
(() => {
  const table = document.getElementById("settings-table"), body = table.tBodies[0];
  const heads = [...table.tHead.rows[0].cells], rows = [...body.rows];
  const order = new Intl.Collator("en", { numeric: true }).compare;
  const value = (row, column) => row.cells[column].textContent;
  const compare = column => (a, b) => {
    const x = value(a, column), y = value(b, column);
    const [numberX, numberY] = [x, y].map(text => text !== "" && !isNaN(text));
    // Numbers before text, else the order depends on the start.
    return numberX && numberY ? x - y : numberX !== numberY ? numberY - numberX : order(x, y);
  };
  heads.forEach((head, column) => head.firstElementChild.addEventListener("click", () => {
    const down = head.getAttribute("aria-sort") === "ascending";
    heads.forEach(other => other.removeAttribute("aria-sort"));
    head.setAttribute("aria-sort", down ? "descending" : "ascending");
    const sorted = [...rows].sort(compare(column));
    body.append(...(down ? sorted.reverse() : sorted));
  }));

  const search = document.getElementById("search"), changed = document.getElementById("changed"), shown = document.getElementById("shown");
  const filter = () => {
    const words = search.value.toLowerCase().split(/\s+/).filter(Boolean);
    let count = 0;
    for (const row of rows) {
      const text = row.textContent.toLowerCase();
      row.hidden = !words.every(word => text.includes(word)) || (changed.checked && !row.classList.contains("changed"));
      count += !row.hidden;
    }
    shown.textContent = count === rows.length ? `${count} settings` : `${count} of ${rows.length} settings`;
  };
  search.addEventListener("input", filter);
  changed.addEventListener("change", filter);
  filter();

  const copy = document.getElementById("copy"), command = document.getElementById("command");
  copy.addEventListener("click", async () => {
    try {
      await navigator.clipboard.writeText(command.textContent);
      copy.textContent = "copied";
    } catch {
      getSelection().selectAllChildren(command); // the clipboard may be closed to pages: Ctrl+C copies it
      copy.textContent = "selected";
    }
    setTimeout(() => { copy.textContent = "copy"; }, 2000);
  });
})();
