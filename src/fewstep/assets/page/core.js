"use strict";
// What the page is told, its pictures, and what may be kept in the browser.
const told = JSON.parse(document.getElementById("data").textContent);
const names = told.candidates.map((candidate) => candidate.name);
const get = (id) => document.getElementById(id);

function make(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.append(...children);
  return element;
}

// Blocks of base64 lines come after this script; the last few that were used stay split.
const blocks = new Map();
const BLOCKS_KEPT = 6;

function block(number) {
  let lines = blocks.get(number);
  if (!lines) {
    const element = get(`block-${number}`);
    if (!element || (document.readyState === "loading" && !element.nextElementSibling)) return null; // still on its way
    lines = element.textContent.split("\n");
  }
  blocks.delete(number);
  blocks.set(number, lines);
  if (blocks.size > BLOCKS_KEPT) blocks.delete(blocks.keys().next().value);
  return lines;
}

function pictureUrl(row, column) {
  const lines = block(Math.floor(row / told.rows));
  return lines && `data:image/webp;base64,${lines[(row % told.rows) * names.length + column]}`;
}

// Shows a picture now, or as soon as its block has arrived. Films of one address play as one, so that one that is to
// begin anew gets an address of its own: a fragment, which changes nothing of the data.
const wanted = new Map();

let begun = 0;

function beginTogether(images) {
  if (!told.candidates.some((candidate) => candidate.moves)) return 0;
  images.forEach((image) => image.removeAttribute("src"));
  return (begun += 1);
}

function showPicture(image, row, column, alt, time = 0) {
  const { width, height } = told.candidates[column];
  Object.assign(image, { width, height, alt });
  image.classList.toggle("small", Math.max(width, height) <= 128);
  const url = pictureUrl(row, column);
  if (url) {
    wanted.delete(image);
    image.src = time ? `${url}#${time}` : url;
  } else {
    image.removeAttribute("src");
    if (!wanted.size) setTimeout(tryAgain, 60);
    wanted.set(image, [row, column, alt, time]);
  }
}

function tryAgain() {
  const before = [...wanted];
  wanted.clear();
  for (const [image, what] of before) if (image.isConnected) showPicture(image, ...what);
}

// Kept in the browser, where it lets us; in memory otherwise.
const memory = new Map();

function remember(key, value) {
  memory.set(key, value);
  try {
    localStorage.setItem(`fewstep-${key}`, value);
    return true;
  } catch {
    return false;
  }
}

function recall(key) {
  if (memory.has(key)) return memory.get(key);
  try {
    return localStorage.getItem(`fewstep-${key}`);
  } catch {
    return null;
  }
}

function checkboxes(parent, chosen, changed) {
  names.forEach((name, index) => {
    const box = make("input", { type: "checkbox" });
    box.checked = chosen.has(index);
    box.addEventListener("change", () => {
      if (box.checked) chosen.add(index);
      else chosen.delete(index);
      changed();
    });
    parent.append(make("label", {}, box, ` ${name}`));
  });
}

const typing = (event) => event.target.closest("input, select, textarea") !== null;
