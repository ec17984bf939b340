// What votes say; the same arithmetic as evaluation/preferences.py.
const FORMAT = "fewstep-votes-1";
const Z = 1.959963984540054;

// Wilson's 95 % interval of a share of so many trials.
function wilson(share, count) {
  const middle = (share + Z ** 2 / (2 * count)) / (1 + Z ** 2 / count);
  const half = (Z / (1 + Z ** 2 / count)) * Math.sqrt((share * (1 - share)) / count + (Z / (2 * count)) ** 2);
  return [Math.max(0, middle - half), Math.min(1, middle + half)];
}

// Of candidate a against b, or against all others: every prompt counts once.
function preference(votes, a, b = null) {
  const worth = new Map();
  const counts = { won: 0, equal: 0, lost: 0 };
  for (const vote of votes) {
    if (vote.a !== a && vote.b !== a) continue;
    const forFirst = { a: 1, equal: 0.5, b: 0 }[vote.choice];
    const value = vote.a === a ? forFirst : 1 - forFirst;
    counts[value === 1 ? "won" : value ? "equal" : "lost"] += 1;
    const prompt = JSON.stringify([vote.prompt, vote.seed]);
    worth.set(prompt, [...(worth.get(prompt) ?? []), value]);
  }
  const mean = (values) => values.reduce((sum, value) => sum + value, 0) / values.length;
  const share = mean([...worth.values()].map(mean));
  return { a, b, ...counts, prompts: worth.size, share, interval: wilson(share, worth.size) };
}

function preferences(votes) {
  const voted = names.filter((name) => votes.some((vote) => vote.a === name || vote.b === name));
  const alone = voted.map((name) => preference(votes, name)).sort((one, other) => other.share - one.share);
  const pairs = voted.flatMap((a, i) => voted.slice(i + 1).flatMap((b) => {
    const among = votes.filter((vote) => (vote.a === a && vote.b === b) || (vote.a === b && vote.b === a));
    return among.length ? [preference(among, a, b)] : [];
  }));
  return { alone, pairs };
}

function preferenceTable(rows, title) {
  const percent = (value) => Math.round(100 * value);
  const head = [title, "preferred", "won", "equal", "lost", "prompts"].map((text) => make("th", { scope: "col" }, text));
  const body = rows.map((row) => {
    const name = row.b === null ? row.a : `${row.a} against ${row.b}`;
    const share = `${percent(row.share)} % [${row.interval.map(percent).join(", ")}]`;
    const cells = [share, row.won, row.equal, row.lost, row.prompts].map((text) => make("td", {}, String(text)));
    return make("tr", {}, make("th", { scope: "row" }, name), ...cells);
  });
  const table = make("table", {}, make("thead", {}, make("tr", {}, ...head)), make("tbody", {}, ...body));
  return make("div", { class: "scores", tabindex: 0, role: "region", "aria-label": title }, table);
}

// Votes of a file, if it belongs to this page: an Error says why not.
function readVotes(text) {
  const file = JSON.parse(text);
  if (file?.format !== FORMAT || !Array.isArray(file.votes)) throw new Error("no file of votes");
  if (file.page !== told.page) throw new Error("votes on other candidates");
  for (const vote of file.votes) {
    const known = names.includes(vote?.a) && names.includes(vote.b) && vote.a !== vote.b && typeof vote.voter === "string";
    const choice = ["a", "equal", "b"].includes(vote?.choice);
    if (!known || !choice || typeof vote.prompt !== "string" || !Number.isInteger(vote.seed)) throw new Error("a damaged vote");
  }
  return file.votes;
}

// Later answers to the same question take the place of earlier ones.
function merged(votes) {
  const question = (vote) => JSON.stringify([vote.voter, vote.prompt, vote.seed, [vote.a, vote.b].sort()]);
  const latest = new Map();
  for (const vote of votes) {
    latest.delete(question(vote));
    latest.set(question(vote), vote);
  }
  return [...latest.values()];
}

const votesFile = (votes) => JSON.stringify({ format: FORMAT, page: told.page, votes }, null, 1);
