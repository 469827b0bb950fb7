// Starts the page: theme, tables that sort, and the gallery where there are latents.

function theme() {
  const button = document.getElementById("theme");
  const choices = ["auto", "light", "dark"];
  let choice = "auto";
  try {
    choice = choices.find((c) => c === localStorage.getItem("mmsae-theme")) ?? "auto";
  } catch { /* a browser may refuse storage to local files */ }
  const show = () => {
    document.documentElement.dataset.theme = choice;
    button.textContent = `Theme: ${choice}`;
  };
  button.addEventListener("click", () => {
    choice = choices[(choices.indexOf(choice) + 1) % choices.length];
    try {
      localStorage.setItem("mmsae-theme", choice);
    } catch { /* as above */ }
    show();
  });
  show();
}

/** A click sorts by a column, numbers from the largest; the next click turns the order round. */
function sortable(table) {
  const body = table.tBodies[0];
  table.querySelectorAll("th").forEach((heading, column) => {
    heading.querySelector("button").addEventListener("click", () => {
      const numeric = heading.classList.contains("number");
      const now = heading.getAttribute("aria-sort");
      const descending = now ? now === "ascending" : numeric;
      table.querySelectorAll("th").forEach((th) => th.removeAttribute("aria-sort"));
      heading.setAttribute("aria-sort", descending ? "descending" : "ascending");
      const key = (row) => row.cells[column].dataset.order;
      const sign = descending ? -1 : 1;
      const rows = [...body.rows].sort((a, b) => {
        const [one, two] = [key(a), key(b)];
        if (one === "" || two === "") return (one === "") - (two === "");
        return sign * (numeric ? Number(one) - Number(two) : one.localeCompare(two, "en", { numeric: true }));
      });
      body.append(...rows);
    });
  });
}

theme();
document.querySelectorAll("table.sortable").forEach(sortable);
const stored = JSON.parse(document.getElementById("data").textContent);
if (stored.latents.length) gallery(stored);
