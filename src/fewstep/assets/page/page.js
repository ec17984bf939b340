"use strict";
{
  const frame = document.querySelector(".pictures");
  const heads = [...frame.querySelectorAll("thead th")].slice(1);
  const rows = [...frame.querySelectorAll("tbody tr")];
  const zoom = document.querySelector("dialog.zoom");
  const picture = zoom.querySelector("img");
  let row = 0, column = 0;

  const button = (r, c) => rows[r].cells[c + 1].querySelector("button");

  function show(r, c) {
    if (r < 0 || c < 0 || r >= rows.length || c >= heads.length) return;
    [row, column] = [r, c];
    const source = button(r, c).firstChild;
    picture.src = source.src;
    picture.alt = source.alt;
    picture.classList.toggle("small", source.naturalWidth <= 128);
    const [prompt, seed] = rows[r].cells[0].children;
    zoom.querySelector("b").textContent = `${heads[c].firstChild.textContent}, ${heads[c].lastChild.textContent}`;
    zoom.querySelector("figcaption span").textContent = `${prompt.textContent} (${seed.textContent})`;
    if (!zoom.open) { zoom.showModal(); zoom.focus(); }
  }

  frame.addEventListener("click", (event) => {
    const cell = event.target.closest("td");
    if (cell) show(rows.indexOf(cell.parentNode), cell.cellIndex - 1);
  });
  zoom.addEventListener("click", (event) => {
    const step = Number(event.target.dataset.step);
    if (step) show(row, (column + step + heads.length) % heads.length);
    else if (event.target === zoom || event.target === picture || "close" in event.target.dataset) zoom.close();
  });
  zoom.addEventListener("keydown", (event) => {
    const [down, right] = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0] }[event.key] ?? [];
    if (down === undefined) return;
    event.preventDefault();
    show(row + down, column + right);
  });
  zoom.addEventListener("close", () => button(row, column).focus());

  // Without this script all rows are there from the start.
  const more = document.querySelector(".more");
  if (more) {
    frame.classList.add("folded");
    more.hidden = false;
    more.addEventListener("click", () => { frame.classList.remove("folded"); more.remove(); });
  }

  const copy = document.querySelector(".command button");
  if (copy && navigator.clipboard) {
    copy.hidden = false;
    copy.addEventListener("click", async () => {
      await navigator.clipboard.writeText(document.querySelector(".command code").textContent);
      copy.textContent = "Copied";
    });
  }
}
