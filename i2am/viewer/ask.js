// What is asked, and what every panel answers.

const state = {
  a: null, b: null, source: null, query: null, pinned: false, slice: "all", weights: "uniform", measure: "share",
  threshold: 0.4, opacity: 0.85, outlines: true, range: "own",
};
let panels = [], ready = false, drag = null;

const PAIRS = { generated: "pairs_g2r", reference: "pairs_r2g" };
const AXES = { t: "times", h: "heads", l: "layers" };
// of a map by its name, and of its source, which has a name where there are others
const NAMES = {
  share: ({ share }) => `R2G \u00b7 share of attention to ${share}`,
  r2g: ({ name }) => `R2G \u00b7 where ${name || "the reference"} went`,
  r2g_mask: ({ name }) => `R2G \u00b7 where the masked object${name && ` of ${name}`} went`,
  g2r: ({ name }) => `G2R \u00b7 where the generated picture looked${name && ` on ${name}`}`,
  g2r_mask: ({ name }) => `G2R \u00b7 where the painted part looked${name && ` on ${name}`}`,
  pairs_g2r: () => "G2R \u00b7 where it looked",
  pairs_r2g: () => "R2G \u00b7 where it went",
};

function compared() {
  return panels.filter(({ side }) => side === "generated").length > 1;
}

// Those that looked at the source chosen.
function regionsOf({ regions, stacks }) {
  return regions.filter((_, i) => stacks[`region ${i}`]);
}

function askable(sample) {
  return Boolean(sample?.stacks.pairs_g2r);
}

// The cells of a query on another grid: a compared sample may have one of its own.
function onGrid({ cells, grid }, [rows, columns]) {
  if (grid[0] === rows && grid[1] === columns) return cells;
  const moved = (cell, from, to, last) => Math.min(to - 1, Math.floor(((cell + (last ? 0.999 : 0)) * to) / from));
  return [moved(cells[0], grid[0], rows), moved(cells[1], grid[1], columns),
    moved(cells[2], grid[0], rows, true), moved(cells[3], grid[1], columns, true)];
}

function asked({ sample, side }) {
  const { query } = state, { stacks } = sample;
  if (!query) {
    const stack = stacks[overall({ sample, side })];
    return stack ? { stack } : { missing: "no map was kept" };
  }
  if (query.region !== undefined) {
    const at = sample.regions.findIndex(({ name }) => name === query.region);
    if (at < 0) return { missing: "this region was not declared" };
    const { box, truth } = sample.regions[at];
    return side === "generated" ? { box: box && { fractions: box } } : { stack: stacks[`region ${at}`], truth };
  }
  const stack = stacks[PAIRS[query.side]];
  if (!stack) return { missing: "no pair maps were recorded" };
  const area = onGrid(query, stack.asked);
  return query.side === side ? { box: { cells: area, grid: stack.asked } } : { stack, area };
}

function answers() {
  const found = panels.map(asked);
  for (const answer of found) {
    if (!answer.stack) continue;
    if (!answer.stack.has(state.slice)) {
      answer.missing = answer.stack.name.startsWith("pairs")
        ? "layers were not kept apart per patch: choose all, a time or a head" : "there is no such slice here";
      answer.stack = null;
      continue;
    }
    answer.values = answer.stack.read(state.slice, answer.area);
    answer.own = rangeOf(answer.values);
    [answer.low, answer.high] = [answer.own.low, answer.own.high];
  }
  if (state.range === "shared")
    for (const side of ["generated", "reference"]) share(found.filter(({ stack }, i) => stack && panels[i].side === side));
  return found;
}

// One range for the maps that a reader compares: both samples, and all slices of the axis chosen.
function share(group) {
  let low = Infinity, high = -Infinity;
  for (const { stack, area } of group)
    for (const slice of stack.slices.filter((name) => name[0] === state.slice[0])) {
      const range = rangeOf(stack.read(slice, area));
      [low, high] = [Math.min(low, range.low), Math.max(high, range.high)];
    }
  for (const answer of group) [answer.low, answer.high] = [low, high];
}

function flat({ low, high }) {
  return high - low <= 1e-6 * Math.max(Math.abs(low), Math.abs(high));
}

function sliceName(sample) {
  if (state.slice === "all") return "";
  return sample[AXES[state.slice[0]]][Number(state.slice.slice(1))] ?? state.slice;
}

function cellsName([top, left, bottom, right]) {
  const span = (word, from, to) => (from === to ? `${word} ${from}` : `${word}s ${from} to ${to}`);
  return `${span("row", top, bottom)}, ${span("column", left, right)}`;
}

function peakName({ own, stack }) {
  const row = Math.floor(own.peak / stack.grid[1]), column = own.peak % stack.grid[1];
  return cellsName([row, column, row, column]);
}

function sentence(found) {
  const { query } = state, sample = panels[0].sample;
  if (!query) {
    const { source, sources } = sample;
    if (askable(sample)) return "Point at a patch of either picture: where did it look, where did it go?";
    if (sample.maps.length && !source.reference) return `Where on the generated picture did ${source.name} go?`;
    if (sources.filter(({ reference }) => reference).length > 1) return "Patches can be pointed at where there is a single reference.";
    return sample.payloads.pairs ? "Unpacking the maps of patches\u2026"
      : sample.maps.length ? "Pointing at patches needs pair maps, which record(pairs=True) keeps." : "No maps were kept of this sample.";
  }
  const at = found.findIndex(({ stack }, i) => stack && panels[i].sample === sample);
  if (at < 0) return `No map: ${found.find(({ missing }) => missing)?.missing ?? "nothing was recorded"}.`;
  const { own, area } = found[at];
  const who = query.region !== undefined ? query.region
    : `${cellsName(area).replace(/^r/, "R")} of the ${query.side === "generated" ? "generated picture" : "reference"}`;
  const several = area && (area[0] !== area[2] || area[1] !== area[3]);
  const verb = query.side === "reference" ? (several ? "go" : "goes") : several ? "look" : "looks";
  const during = state.slice === "all" ? "" : ` (${sliceName(sample)})`;
  if (flat(own)) return `${who} ${verb} everywhere alike${during}.`;
  const [to, where] = query.side === "reference" ? ["most to", "generated picture"] : ["most at", "reference"];
  return `${who} ${verb} ${to} ${peakName(found[at])} of the ${where}: ${percent(own.high / own.total)} of this map${during}.`;
}

// A circle around the patch with the largest value, wide enough to leave it to be seen.
function ring(panel, { own, stack }) {
  const row = Math.floor(own.peak / stack.grid[1]), column = own.peak % stack.grid[1];
  const { x, y, width, height } = panel.place({ cells: [row, column, row, column], grid: stack.grid });
  const r = Math.max(0.85 * Math.max(width, height), 0.02 * panel.picture.height);
  return { cx: x + width / 2, cy: y + height / 2, r };
}

function show() {
  if (!panels.length) return;
  const began = performance.now(), found = answers();
  const { threshold, opacity, outlines, slice, query } = state;
  panels.forEach((panel, i) => {
    const answer = found[i], { stack, area, own, low, high } = answer;
    const key = stack ? JSON.stringify([stack.name, slice, area, low, high, threshold, opacity]) : "plain";
    panel.draw(stack ? answer : null, state, key);
    panel.outline(outlines && panel.picture.outline ? { d: panel.picture.outline } : null);
    panel.box(answer.box ? panel.place(answer.box) : null);
    panel.peak(stack && query && !flat(own) ? ring(panel, answer) : null);
    const { truth } = answer, { width, height } = panel.picture;
    panel.truth(truth ? { ...ring(panel, answer), cx: truth[1] * width, cy: truth[0] * height } : null);
    const region = stack?.name.startsWith("region") ? `G2R \u00b7 where ${query.region} looked` : null;
    panel.subtitle.textContent = answer.missing ?? region ?? (stack ? NAMES[stack.name](panel.source) : "what is asked about");
    if (stack && flat(own)) panel.subtitle.textContent += " (the same everywhere)";
    else if (stack && query && compared()) panel.subtitle.textContent += `; most at ${peakName(answer)}`;
    if (truth) panel.subtitle.textContent += "; dashed: the true place";
    rate(panel, stack);
    panel.stage.classList.toggle("asked", Boolean(answer.box));
  });
  reading.textContent = sentence(found);
  report(found, performance.now() - began);
}

// For tests, and for whoever wants the numbers behind the picture.
function report(found, ms) {
  status.dataset.ready = ready;
  status.textContent = JSON.stringify({
    ready, ms, ...state,
    panels: panels.map(({ sample, side }, i) => {
      const { stack, area, box, own, low, high, missing } = found[i];
      const cell = own && [Math.floor(own.peak / stack.grid[1]), own.peak % stack.grid[1]];
      return { sample: sample.id, source: sample.source.name, side, map: stack?.name ?? null, area: area ?? box?.cells ?? null, missing,
        low, high, peak: cell, value: own?.high, total: own?.total, flat: own && flat(own) };
    }),
  });
}
