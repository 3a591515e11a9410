"use strict";
const activate = () => {
  const list = document.getElementById("list");
  if (!list) return;
  const rows = [...list.children];
  const search = document.getElementById("search");
  const sort = document.getElementById("sort");
  const count = document.getElementById("count");
  const texts = new Map(rows.map((row) => [row, row.textContent.toLowerCase()]));
  const number = (row, key) => {
    const value = Number.parseFloat(row.dataset[key]);
    return Number.isNaN(value) ? -Infinity : value;
  };
  const show = () => {
    const wanted = search.value.trim().toLowerCase();
    const key = sort.value.replace("-", "") || "order";
    const sign = sort.value === "" || sort.value.startsWith("-") ? 1 : -1;
    let shown = 0;
    rows.sort((a, b) => sign * (number(a, key) - number(b, key)) || number(a, "order") - number(b, "order"));
    for (const row of rows) {
      row.hidden = !texts.get(row).includes(wanted);
      shown += row.hidden ? 0 : 1;
      list.append(row);
    }
    count.textContent = shown === rows.length ? `${shown} prompts` : `${shown} of ${rows.length} prompts`;
  };
  search.addEventListener("input", show);
  sort.addEventListener("change", show);
  show();
};
activate();
