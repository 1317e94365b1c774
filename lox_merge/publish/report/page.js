// Heads of tables become buttons that sort. Without scripts the tables are as they stand.
for (const table of document.querySelectorAll("table")) {
  const heads = [...table.tHead.rows[0].cells];
  const body = table.tBodies[0];
  heads.forEach((head, column) => {
    const button = document.createElement("button");
    button.type = "button";
    button.append(...head.childNodes);
    head.append(button);
    const numeric = head.classList.contains("number");
    button.addEventListener("click", () => {
      const order = head.getAttribute("aria-sort") === "ascending" ? "descending" : "ascending";
      for (const other of heads) other.removeAttribute("aria-sort");
      head.setAttribute("aria-sort", order);
      const sign = order === "ascending" ? 1 : -1;
      const value = (row) => row.cells[column].dataset.value;
      const compare = (one, other) =>
        numeric && !Number.isNaN(one - other) ? one - other : String(one).localeCompare(String(other), "en", { numeric: true });
      const rows = [...body.rows].sort((one, other) => {
        const [first, second] = [value(one), value(other)];
        if (first === undefined || second === undefined) return (first === undefined) - (second === undefined); // no value: last
        return sign * compare(first, second);
      });
      body.append(...rows);
    });
  });
}
