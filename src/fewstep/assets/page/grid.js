// The grid of pictures, a leaf at a time, and the dialog that enlarges one.
const grid = { order: told.prompts.map((_, row) => row), leaf: 0, shown: new Set(names.keys()) };
const leaves = () => Math.max(1, Math.ceil(grid.order.length / told.rows));

function drawGrid() {
  grid.leaf = Math.min(Math.max(grid.leaf, 0), leaves() - 1);
  const columns = [...names.keys()].filter((column) => grid.shown.has(column));
  const rows = grid.order.slice(grid.leaf * told.rows, (grid.leaf + 1) * told.rows);
  const heads = columns.map((column) => {
    const { name, calls } = told.candidates[column];
    return make("div", {}, name, make("small", {}, `${calls} call${calls === 1 ? "" : "s"}`));
  });
  const articles = rows.map((row) => {
    const shots = columns.map((column) => {
      const image = make("img", { decoding: "async", loading: "lazy" });
      showPicture(image, row, column, `${names[column]}: ${told.prompts[row]}`);
      const button = make("button", { "data-row": row, "data-column": column }, image);
      return make("figure", {}, button, make("figcaption", { "aria-hidden": "true" }, names[column]));
    });
    const text = make("span", { dir: "auto", title: told.prompts[row] }, told.prompts[row]);
    const head = make("h3", {}, text, make("small", {}, `seed ${told.seeds[row]}`));
    return make("article", {}, head, make("div", { class: "shots" }, ...shots));
  });
  const nothing = make("p", { class: "hint" }, rows.length ? "No candidate is chosen." : "No prompt has these words.");
  const empty = !rows.length || !columns.length;
  const header = make("div", { class: "heads", "aria-hidden": "true" }, make("div", {}, "prompt"), ...heads);
  get("grid").replaceChildren(...(empty ? [nothing] : [header, ...articles]));
  get("grid").style.setProperty("--columns", columns.length);
  get("leaves").hidden = leaves() === 1;
  get("leaf").max = leaves();
  get("leaf").value = grid.leaf + 1;
  get("leaves").querySelector("span").textContent = `of ${leaves()}`;
  fitGrid();
}

// Columns under one head where they fit, else a card per prompt.
function fitGrid() {
  const frame = get("grid");
  const columns = grid.shown.size;
  const side = Math.min(Number(get("size").value), Math.floor((frame.clientWidth - 180) / columns) - 8);
  frame.classList.toggle("cards", side < Math.min(84, Number(get("size").value)));
  frame.style.setProperty("--side", `${frame.classList.contains("cards") ? get("size").value : side}px`);
}

function turn(leaf) {
  grid.leaf = leaf;
  drawGrid();
  get("pictures").scrollIntoView();
}

// At first as large as fills the width, within reason.
const room = (Math.min(innerWidth, 1160) - 228) / names.length - 8;
get("size").value = innerWidth < 600 ? 112 : Math.min(Math.max(room, 112), 208);
get("size").addEventListener("input", fitGrid);
get("grid-controls").addEventListener("submit", (event) => event.preventDefault());
get("find").addEventListener("input", () => {
  const words = get("find").value.toLowerCase().split(/\s+/).filter(Boolean);
  const fits = (prompt) => words.every((word) => prompt.toLowerCase().includes(word));
  grid.order = [...told.prompts.keys()].filter((row) => fits(told.prompts[row]));
  grid.leaf = 0;
  drawGrid();
});
checkboxes(get("shown"), grid.shown, drawGrid);
get("leaf").addEventListener("change", () => turn(Number(get("leaf").value) - 1));
get("leaves").addEventListener("click", (event) => {
  const where = event.target.dataset.leaf;
  if (where) turn({ first: 0, previous: grid.leaf - 1, next: grid.leaf + 1, last: leaves() - 1 }[where]);
});

// The dialog shows `look(row, column)` and goes to the neighbours that exist.
const zoom = document.querySelector("dialog.zoom");
let look = null;
let at = [0, 0];

function enlarge(what, row, column, slides = false) {
  look = what;
  zoom.querySelector("[data-slide]").hidden = !slides;
  goTo(row, column);
}

function goTo(row, column) {
  const found = look(row, column);
  if (!found) return;
  at = [row, column];
  const image = zoom.querySelector("img");
  showPicture(image, found.row, found.column, found.title);
  zoom.querySelector("b").textContent = found.title;
  zoom.querySelector("figcaption span").textContent = `${told.prompts[found.row]} (seed ${told.seeds[found.row]})`;
  if (!zoom.open) {
    zoom.showModal();
    zoom.focus();
  }
}

zoom.addEventListener("click", (event) => {
  const { step, close, slide } = event.target.dataset;
  if (step) goTo(at[0], at[1] + Number(step));
  else if (slide !== undefined) {
    zoom.close();
    openPair(look(...at).row, look(...at).column);
  } else if (close !== undefined || event.target === zoom || event.target.tagName === "IMG") zoom.close();
});
zoom.addEventListener("keydown", (event) => {
  const [down, right] = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0] }[event.key] ?? [];
  if (down === undefined) return;
  event.preventDefault();
  goTo(at[0] + down, at[1] + right);
});

// In the grid: rows are places in its order, columns the candidates shown.
function inGrid(place, column) {
  const columns = [...names.keys()].filter((each) => grid.shown.has(each));
  if (place < 0 || place >= grid.order.length) return null;
  const candidate = columns[(column + columns.length) % columns.length];
  return { row: grid.order[place], column: candidate, title: names[candidate] };
}

get("grid").addEventListener("click", (event) => {
  const button = event.target.closest("button");
  if (!button) return;
  const columns = [...names.keys()].filter((each) => grid.shown.has(each));
  enlarge(inGrid, grid.order.indexOf(Number(button.dataset.row)), columns.indexOf(Number(button.dataset.column)),
    names.length > 1);
});
zoom.addEventListener("close", () => {
  if (look !== inGrid) return;
  const { row, column } = look(...at);
  const leaf = Math.floor(at[0] / told.rows);
  if (leaf !== grid.leaf) turn(leaf);
  get("grid").querySelector(`[data-row="${row}"][data-column="${column}"]`).focus();
});
