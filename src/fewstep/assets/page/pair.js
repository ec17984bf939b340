// Two candidates of one prompt: a slider between them, or side by side, zoomed alike.
const pair = { row: 0, zoom: 1, x: 0, y: 0 };
const stage = get("stage");
const layers = [...stage.querySelectorAll(".layer")];
const LARGEST = 16;

for (const [id, chosen] of [["left", 0], ["right", names.length - 1]]) {
  names.forEach((name, index) => get(id).append(make("option", { value: index }, name)));
  get(id).value = chosen;
  get(id).addEventListener("change", drawPair);
}
get("prompt").max = told.prompts.length;

function drawPair() {
  pair.row = Math.min(Math.max(pair.row, 0), told.prompts.length - 1);
  get("prompt").value = pair.row + 1;
  get("pair-text").replaceChildren(told.prompts[pair.row], make("small", {}, ` seed ${told.seeds[pair.row]}`));
  const images = layers.map((layer) => layer.querySelector("img"));
  const time = beginTogether(images);
  ["left", "right"].forEach((id, side) => {
    const column = Number(get(id).value);
    showPicture(images[side], pair.row, column, `${id}: ${names[column]}`, time);
    layers[side].querySelector("b").textContent = names[column];
  });
  const { width, height } = told.candidates[Number(get("left").value)];
  stage.style.setProperty("--ratio", width / height);
  const slides = get("layout").value === "slider";
  stage.classList.toggle("beside", !slides);
  get("divider").closest("label").hidden = !slides;
  moveView();
}

function moveView() {
  pair.zoom = Math.min(Math.max(pair.zoom, 1), LARGEST);
  for (const axis of ["x", "y"]) pair[axis] = Math.min(0, Math.max(1 - pair.zoom, pair[axis]));
  stage.style.setProperty("--x", `${100 * pair.x}%`);
  stage.style.setProperty("--y", `${100 * pair.y}%`);
  stage.style.setProperty("--zoom", pair.zoom);
  stage.style.setProperty("--split", `${get("divider").value}%`);
  stage.classList.toggle("zoomed", pair.zoom > 1);
  get("zoomed").value = `${Number(pair.zoom.toPrecision(2))}×`;
}

// Zooms so that the point (a, b) of the frame, in [0, 1], stays where it is.
function zoomAt(factor, a = 0.5, b = 0.5) {
  const before = pair.zoom;
  pair.zoom = Math.min(Math.max(before * factor, 1), LARGEST);
  pair.x = a - ((a - pair.x) * pair.zoom) / before;
  pair.y = b - ((b - pair.y) * pair.zoom) / before;
  moveView();
}

function openPair(row, column) {
  pair.row = row;
  get("right").value = column;
  if (get("left").value === get("right").value) get("left").value = column ? 0 : names.length - 1;
  location.hash = "pair";
  drawPair();
}

function step(by) {
  pair.row += by;
  drawPair();
}

get("pair-controls").addEventListener("submit", (event) => event.preventDefault());
get("layout").addEventListener("change", drawPair);
get("divider").addEventListener("input", moveView);
get("prompt").addEventListener("change", () => {
  pair.row = Math.round(Number(get("prompt").value)) - 1 || 0;
  drawPair();
});
get("pair").addEventListener("click", (event) => {
  const { move, zoom: factor } = event.target.dataset;
  if (move) step(Number(move));
  if (factor === "0") Object.assign(pair, { zoom: 1, x: 0, y: 0 });
  if (factor) zoomAt(Number(factor) || 1);
});

stage.addEventListener("keydown", (event) => {
  const [x, y] = { ArrowLeft: [1, 0], ArrowRight: [-1, 0], ArrowUp: [0, 1], ArrowDown: [0, -1] }[event.key] ?? [0, 0];
  if (x || y) {
    if (pair.zoom > 1) [pair.x, pair.y] = [pair.x + 0.1 * x, pair.y + 0.1 * y];
    else if (x) get("divider").value = Number(get("divider").value) - 5 * x;
    else return;
    moveView();
  } else if (event.key === "+" || event.key === "=") zoomAt(2);
  else if (event.key === "-") zoomAt(0.5);
  else if (event.key === "0") zoomAt(0);
  else if (event.key === "PageUp" || event.key === "PageDown") step(event.key === "PageUp" ? -1 : 1);
  else return;
  event.preventDefault();
});

// Dragging: the divider at full view, the picture when zoomed; two fingers zoom.
const fingers = new Map();
const frameOf = (event) => (event.target.closest(".layer") ?? stage).getBoundingClientRect();
const place = (event, frame) => [(event.clientX - frame.left) / frame.width, (event.clientY - frame.top) / frame.height];
const apart = ([a, b]) => Math.hypot(a.clientX - b.clientX, a.clientY - b.clientY);

stage.addEventListener("wheel", (event) => {
  event.preventDefault();
  zoomAt(2 ** (-event.deltaY / 300), ...place(event, frameOf(event)));
}, { passive: false });
stage.addEventListener("pointerdown", (event) => {
  fingers.set(event.pointerId, event);
  stage.setPointerCapture(event.pointerId);
  if (fingers.size === 1) slide(event);
});
stage.addEventListener("pointermove", (event) => {
  const before = fingers.get(event.pointerId);
  if (!before) return;
  const others = [...fingers.values()].filter((each) => each.pointerId !== event.pointerId);
  if (others.length === 1) {
    const frame = layers[0].getBoundingClientRect();
    zoomAt(apart([event, others[0]]) / Math.max(1, apart([before, others[0]])), ...place(others[0], frame));
  } else if (pair.zoom > 1) {
    const frame = layers[0].getBoundingClientRect();
    pair.x += (event.clientX - before.clientX) / frame.width;
    pair.y += (event.clientY - before.clientY) / frame.height;
    moveView();
  } else slide(event);
  fingers.set(event.pointerId, event);
});
for (const end of ["pointerup", "pointercancel"]) stage.addEventListener(end, (event) => fingers.delete(event.pointerId));

function slide(event) {
  if (pair.zoom > 1 || get("layout").value !== "slider") return;
  get("divider").value = 100 * place(event, stage.getBoundingClientRect())[0];
  moveView();
}

get("pair").addEventListener("shown", drawPair);
