// The blind test: two pictures, no names, an answer, the next.
const KEY = `votes-${told.page}`;
const taking = new Set(names.keys());
let votes = [];
let trial = null;

const nameless = recall("voter-id") ?? Math.random().toString(36).slice(2, 8);
let kept = remember("voter-id", nameless);
get("voter").value = recall("voter") ?? "";
const voter = () => get("voter").value.trim() || nameless;
const mine = () => votes.filter((vote) => vote.voter === voter());

function tell(text) {
  get("told").textContent = text;
}

function keepVotes() {
  kept = remember(KEY, votesFile(votes));
  get("count").textContent = `${mine().length} vote${mine().length === 1 ? "" : "s"}`;
  if (!kept) tell("This browser does not let the page keep votes: save them as a file before you close it.");
  if (get("result").open) drawResult();
}

function drawResult() {
  const { alone, pairs } = preferences(votes);
  const voters = new Set(votes.map((vote) => vote.voter)).size;
  const hint = `${votes.length} votes of ${voters} voter${voters === 1 ? "" : "s"}; equal ones count half; in brackets ` +
    "Wilson's 95 % interval, in which every prompt counts once.";
  const tables = [preferenceTable(alone, "against all others"), preferenceTable(pairs, "pair")];
  const parts = votes.length ? [make("p", { class: "hint" }, hint), ...tables] : [make("p", {}, "No vote yet.")];
  get("result").querySelector("div").replaceChildren(...parts);
}

const any = (list) => list[Math.floor(Math.random() * list.length)];

function fewest(list, count) {
  const counts = list.map(count);
  const least = Math.min(...counts);
  return any(list.filter((_, index) => counts[index] === least));
}

// The pair this voter has seen least, and for it a prompt seen least.
function nextTrial() {
  const columns = [...taking].sort((a, b) => a - b);
  const pairs = columns.flatMap((a, i) => columns.slice(i + 1).map((b) => [a, b]));
  trial = null;
  if (pairs.length) {
    const own = mine();
    const about = ([a, b]) => own.filter((vote) => [names[a], names[b]].every((name) => name === vote.a || name === vote.b));
    const chosen = fewest(pairs, (one) => about(one).length);
    const seen = new Map();
    for (const { prompt, seed } of about(chosen)) {
      const key = JSON.stringify([prompt, seed]);
      seen.set(key, (seen.get(key) ?? 0) + 1);
    }
    const row = fewest([...told.prompts.keys()], (n) => seen.get(JSON.stringify([told.prompts[n], told.seeds[n]])) ?? 0);
    trial = { row, columns: Math.random() < 0.5 ? chosen : chosen.reverse() };
  }
  drawTrial();
}

function drawTrial() {
  const off = trial === null;
  get("question").textContent = off ? "Choose two candidates or more below." : told.prompts[trial.row];
  get("duel").hidden = off;
  document.querySelectorAll("[data-choice]").forEach((button) => { button.disabled = off; });
  if (off) return;
  const images = get("duel").querySelectorAll("img");
  const time = beginTogether(images);
  ["Left", "Right"].forEach((side, n) => showPicture(images[n], trial.row, trial.columns[n], `${side} picture`, time));
}

function vote(choice) {
  if (!trial) return;
  const [a, b] = trial.columns.map((column) => names[column]);
  const said = { left: "a", equal: "equal", right: "b" }[choice];
  const answer = { voter: voter(), prompt: told.prompts[trial.row], seed: told.seeds[trial.row], a, b, choice: said };
  votes = merged([...votes, { ...answer, time: new Date().toISOString() }]);
  tell("");
  keepVotes();
  nextTrial();
}

function takeBack() {
  const last = mine().at(-1);
  if (!last) return;
  votes = votes.filter((each) => each !== last);
  const row = told.prompts.findIndex((prompt, n) => prompt === last.prompt && told.seeds[n] === last.seed);
  if (row >= 0) trial = { row, columns: [names.indexOf(last.a), names.indexOf(last.b)] };
  keepVotes();
  drawTrial();
}

get("blind").addEventListener("click", (event) => {
  const choice = event.target.closest("[data-choice]")?.dataset.choice;
  if (choice) vote(choice);
});
document.addEventListener("keydown", (event) => {
  if (get("blind").hidden || zoom.open || typing(event) || event.ctrlKey || event.metaKey || event.altKey) return;
  const choice = { ArrowLeft: "left", ArrowDown: "equal", ArrowRight: "right" }[event.key];
  if (choice) vote(choice);
  else if (event.key === "Backspace") takeBack();
  else return;
  event.preventDefault();
});
get("back").addEventListener("click", takeBack);
get("skip").addEventListener("click", nextTrial);
get("voter").addEventListener("change", () => {
  remember("voter", get("voter").value.trim());
  keepVotes();
});
get("result").addEventListener("toggle", () => { if (get("result").open) drawResult(); });
checkboxes(get("taking").querySelector("div"), taking, nextTrial);

// Enlarged, both stay nameless.
function inDuel(place, side) {
  if (place !== 0 || side < 0 || side > 1) return null;
  return { row: trial.row, column: trial.columns[side], title: side ? "Right picture" : "Left picture" };
}
get("duel").querySelectorAll("button").forEach((button, side) => {
  button.addEventListener("click", () => enlarge(inDuel, 0, side));
});

get("save").addEventListener("click", () => {
  const url = URL.createObjectURL(new Blob([votesFile(votes)], { type: "application/json" }));
  make("a", { href: url, download: `votes-${voter().replace(/[^\w-]+/g, "-")}.json` }).click();
  setTimeout(() => URL.revokeObjectURL(url), 10000);
});
get("load").addEventListener("change", async () => {
  for (const file of get("load").files) {
    try {
      const found = readVotes(await file.text());
      votes = merged([...votes, ...found]);
      tell(`${found.length} votes read from ${file.name}.`);
    } catch (error) {
      tell(`${file.name} was not read: ${error.message}.`);
    }
  }
  get("load").value = "";
  keepVotes();
});
get("clear").addEventListener("click", () => {
  if (!confirm("Delete all votes on this page that are kept in this browser?")) return;
  votes = [];
  tell("Votes deleted.");
  keepVotes();
});

const before = recall(KEY);
if (before) {
  try {
    votes = readVotes(before);
  } catch (error) {
    tell(`Votes kept in this browser were not read: ${error.message}.`);
  }
}
get("count").textContent = `${mine().length} votes`;
get("blind").addEventListener("shown", () => { if (!trial) nextTrial(); });
