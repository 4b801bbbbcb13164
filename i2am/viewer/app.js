// The page: samples, controls, links.

const byId = (id) => document.getElementById(id);
const [status, reading, filter, sort, order, count, cards] =
  ["status", "reading", "filter", "sort", "order", "count", "cards"].map(byId);
const INDEX = JSON.parse(byId("index").textContent), COLORS = bytesOf(INDEX.colors);
const loaded = new Map(), waiting = new Map(), KEPT = 4;
let opening = 0, linkTimer = 0, wanted = null, scrolled = 0;

// Samples

function named(id) {
  return encodeURIComponent(id.toWellFormed ? id.toWellFormed() : id);
}

function documentOf(entry) {
  if (!INDEX.folder) {
    const blocks = document.querySelectorAll("script.sample");
    return Promise.resolve(JSON.parse(blocks[INDEX.samples.indexOf(entry)].textContent));
  }
  return new Promise((resolve, reject) => {
    waiting.set(entry.id, resolve);
    const script = make("script", { src: entry.data });
    script.onload = () => script.remove();
    script.onerror = () => reject(new Error(`${entry.data} is missing beside this page.`));
    document.head.append(script);
  });
}

// called by the files of a folder
window.i2am = { sample: (content) => waiting.get(content.id)?.(content) };

async function load(entry) {
  if (loaded.has(entry.id)) return loaded.get(entry.id);
  const content = await documentOf(entry);
  const sample = { ...content, stacks: {} };
  const take = async (part) => {
    if (!content.payloads[part]) return;
    const buffer = await unpacked(content.payloads[part]);
    for (const map of content.maps) if (map.part === part) sample.stacks[map.name] = new Stack(map, buffer);
  };
  await take("overall");
  sample.joint = () => (sample.unpacking ??= take("joint"));
  loaded.set(entry.id, sample);
  if (loaded.size > KEPT) loaded.delete(loaded.keys().next().value);
  return sample;
}

async function open() {
  const turn = ++opening, entries = [state.a, state.b].map((id) => INDEX.samples.find((entry) => entry.id === id)).filter(Boolean);
  ready = false;
  status.dataset.ready = false;
  try {
    const samples = await Promise.all(entries.map(load));
    const next = samples.flatMap((sample) => [new Panel(sample, "generated"), new Panel(sample, "reference")]);
    await Promise.all(next.map((panel) => panel.load()));
    if (turn !== opening) return;
    panels = next;
    settle();
    build();
    show();
    await new Promise((resolve) => requestAnimationFrame(resolve));
    await Promise.all(samples.map((sample) => sample.joint()));
    if (turn !== opening) return;
    ready = true;
    settle();
    describe();
    show();
    sync();
  } catch (error) {
    fail(error);
  }
}

function fail(error) {
  byId("trouble").hidden = false;
  byId("trouble").textContent = error.message;
}

// Controls

function build() {
  const { sample } = panels[0], pairs = [];
  for (let i = 0; i < panels.length; i += 2) {
    const pair = make("div", { className: "pair" }, panels[i].figure, panels[i + 1].figure);
    const aspects = panels[i].picture.width / panels[i].picture.height + panels[i + 1].picture.width / panels[i + 1].picture.height;
    pair.style.setProperty("--aspects", aspects);
    const heading = panels.length > 2 ? [make("h2", { textContent: panels[i].sample.id })] : [];
    pairs.push(make("section", { className: "one" }, ...heading, pair));
  }
  byId("pictures").replaceChildren(...pairs);
  byId("pictures").classList.toggle("two", panels.length > 2);
  panels.forEach(listen);

  byId("regions").replaceChildren(...(sample.regions.length ? [null, ...sample.regions.map(({ name }) => name)] : []).map((name) =>
    chip(name ?? "Everything", () => ask(name === null ? null : { region: name }, name !== null), name ?? "")));
  byId("weighted").hidden = !sample.stacks.r2g_mask && !sample.stacks.g2r_mask;
  byId("question").hidden = byId("weighted").hidden && !sample.regions.length;
  byId("time").max = sample.times.length;
  byId("time").hidden = byId("time-name").parentElement.hidden = sample.times.length < 2;
  byId("head-row").hidden = sample.heads.length < 2;
  byId("heads").replaceChildren(chip("all", () => slice("all"), "all"),
    ...sample.heads.map((name, i) => chip(String(i), () => slice(`h${i}`), `h${i}`, name)));
  byId("layer-row").hidden = sample.layers.length < 2;
  byId("layer").replaceChildren(make("option", { value: "all", textContent: "all layers" }),
    ...sample.layers.map((name, i) => make("option", { value: `l${i}`, textContent: name })));
  byId("facts").replaceChildren(...Object.entries(sample.facts).flatMap(([name, value]) =>
    [make("dt", { textContent: name }), make("dd", { textContent: value })]));
  byId("notes").replaceChildren(...sample.notes.map((text) => make("li", { textContent: text })));
  const others = Object.keys(sample.scores).filter((name) => !/^imacs_[gr]/.test(name));
  byId("facts").append(...others.flatMap((name) => [make("dt", { textContent: name }), make("dd", { textContent: scoreText(sample.scores[name]) })]));
  byId("facts").parentElement.hidden = !byId("facts").children.length && !sample.notes.length;
  describe();
  sync();
}

function describe() {
  for (const { stage, sample, side } of panels) {
    const what = `${SIDES[side].title} picture${panels.length > 2 ? ` of ${sample.id}` : ""}`;
    if (!askable(sample)) {
      stage.setAttribute("aria-label", `${what}. Patches cannot be pointed at.`);
      stage.classList.remove("live");
      continue;
    }
    const [rows, columns] = sample.stacks[JOINT[side]].asked;
    stage.setAttribute("aria-label", `${what}, ${rows} rows by ${columns} columns of patches. Arrow keys move the patch, with Shift they widen it, Enter holds it, Escape clears it.`);
    stage.classList.add("live");
  }
}

function chip(text, action, value, label) {
  const button = make("button", { type: "button", textContent: text, value });
  if (label) button.setAttribute("aria-label", label);
  button.addEventListener("click", action);
  return button;
}

function scoreText({ value, reason }) {
  return value === null ? `undefined: ${reason}` : signed(value);
}

function pressed(group, value) {
  for (const button of byId(group).children) button.setAttribute("aria-pressed", String(button.value === value));
}

function sync() {
  const { sample } = panels[0], { query, threshold, opacity } = state;
  pressed("regions", query ? query.region ?? null : "");
  pressed("heads", state.slice[0] === "h" ? state.slice : "all");
  pressed("ranges", state.range);
  byId("time").value = state.slice[0] === "t" ? Number(state.slice.slice(1)) + 1 : 0;
  byId("time-name").textContent = state.slice[0] === "t" ? sliceName(sample) : "all steps";
  byId("time").setAttribute("aria-valuetext", byId("time-name").textContent);
  byId("layer").value = state.slice[0] === "l" ? state.slice : "all";
  byId("threshold").value = threshold;
  byId("threshold-value").textContent = threshold.toFixed(2);
  byId("opacity").value = opacity;
  byId("opacity-value").textContent = opacity.toFixed(2);
  byId("weights").checked = state.weights === "mask";
  byId("outlines").checked = state.outlines;
  for (const { sample, side, score } of panels) {
    const masked = state.weights === "mask" && side === "generated" ? sample.scores.imacs_g_mask_votes : null;
    const found = masked ?? sample.scores[SIDES[side].score];
    score.replaceChildren(...(found
      ? ["IMACS", make("sub", { textContent: side[0] }), ` ${found.value === null ? "undefined" : signed(found.value)}`] : []));
    score.title = found?.reason ?? "";
  }
  for (const input of document.querySelectorAll("input[type=range]"))
    input.style.setProperty("--part", (input.value - input.min) / (input.max - input.min || 1));
}

function slice(name) {
  state.slice = name;
  changed();
}

function changed() {
  show();
  sync();
  clearTimeout(linkTimer);
  // not while pointing: browsers allow few changes of the address
  linkTimer = setTimeout(writeLink, 150);
}

// Links: #sample/patch/slice/compared sample

function link() {
  const { a, b, query, pinned, slice } = state;
  let patch = "-";
  if (query && pinned && query.region !== undefined) patch = `@${named(query.region)}`;
  else if (query && pinned) {
    const [top, left, bottom, right] = query.cells;
    patch = `${query.side[0]}${top},${left}${top === bottom && left === right ? "" : `-${bottom},${right}`}`;
  }
  return `#${named(a)}/${patch}/${slice}${b === null ? "" : `/${named(b)}`}`;
}

function writeLink() {
  if (state.a !== null && link() !== location.hash) address("replaceState", link());
}

function address(way, hash) {
  // a page inside another (srcdoc) has no address of its own
  try { history[way](null, "", hash); } catch { /* nothing to keep */ }
}

function go(change) {
  writeLink();
  Object.assign(state, change);
  const hash = link();
  address("pushState", hash);
  readLink(hash);
}

function readLink(hash = location.hash) {
  const [a, patch = "-", slice = "all", b] = hash.slice(1).split("/");
  const entry = (name) => INDEX.samples.find(({ id }) => named(id) === name) ?? null;
  const first = entry(a) ?? (INDEX.folder ? null : INDEX.samples[0]);
  const before = panels.length ? [panels[0].sample.id, panels[2]?.sample.id ?? null] : null;
  clearTimeout(linkTimer);
  view(first);
  if (!first) return;
  const found = /^([gr])(\d+),(\d+)(?:-(\d+),(\d+))?$/.exec(patch);
  wanted = null;
  if (patch[0] === "@") wanted = { region: decoded(patch.slice(1)) };
  else if (found) {
    const [top, left, bottom = top, right = left] = found.slice(2).filter((text) => text !== undefined).map(Number);
    wanted = { side: found[1] === "g" ? "generated" : "reference", cells: [top, left, bottom, right] };
  }
  Object.assign(state, { a: first.id, b: (b !== undefined && entry(b)?.id) || null, slice, query: null, pinned: false });
  byId("sample").value = state.a;
  byId("compare").value = state.b ?? "";
  if (before && same(before, [state.a, state.b])) {
    settle();
    show();
    sync();
  } else open();
}

function decoded(text) {
  try { return decodeURIComponent(text); } catch { return text; }
}

// What a link asks for has a meaning only where the sample with its grids is there.
function settle() {
  const { sample } = panels[0], number = Number(state.slice.slice(1));
  if (state.slice !== "all" && !(/^[thl]\d+$/.test(state.slice) && number < sample[AXES[state.slice[0]]].length)) state.slice = "all";
  if (!wanted) return;
  if (wanted.region !== undefined) {
    if (sample.regions.some(({ name }) => name === wanted.region)) Object.assign(state, { query: wanted, pinned: true });
  } else {
    const stack = sample.stacks[JOINT[wanted.side]];
    if (!stack && sample.payloads.joint) return;
    const [top, left, bottom, right] = wanted.cells, grid = stack?.asked ?? [0, 0];
    if (top <= bottom && left <= right && bottom < grid[0] && right < grid[1])
      Object.assign(state, { query: { ...wanted, grid }, pinned: true });
  }
  wanted = null;
}

function view(entry) {
  const back = byId("list").hidden === false && entry ? window.scrollY : null;
  if (back !== null) scrolled = back;
  byId("list").hidden = Boolean(entry);
  for (const id of ["viewer", "link", "save"]) byId(id).hidden = !entry;
  byId("choose").hidden = byId("against").hidden = !entry || INDEX.samples.length < 2;
  byId("back").hidden = !INDEX.folder || !entry;
  byId("trouble").hidden = true;
  if (entry) {
    if (back !== null) window.scrollTo(0, 0);
    return;
  }
  Object.assign(state, { a: null, b: null, query: null, pinned: false });
  opening++;
  panels = [];
  showList();
  window.scrollTo(0, scrolled);
}

// Start

function choices(select, first) {
  select.replaceChildren(...first, ...INDEX.samples.map(({ id }) => make("option", { value: id, textContent: id })));
}

function start() {
  byId("title").textContent = INDEX.title;
  choices(byId("sample"), []);
  choices(byId("compare"), [make("option", { value: "", textContent: "nothing" })]);
  byId("ranges").replaceChildren(
    chip("each map its own", () => { state.range = "own"; changed(); }, "own"),
    chip("shared", () => { state.range = "shared"; changed(); }, "shared"));
  byId("sample").addEventListener("change", (event) => go({ a: event.target.value }));
  byId("compare").addEventListener("change", (event) => go({ b: event.target.value || null }));
  const bind = (id, event, action) => byId(id).addEventListener(event, ({ target }) => { action(target); changed(); });
  bind("time", "input", ({ value }) => { state.slice = Number(value) ? `t${value - 1}` : "all"; });
  bind("layer", "change", ({ value }) => { state.slice = value; });
  bind("threshold", "input", ({ value }) => { state.threshold = Number(value); });
  bind("opacity", "input", ({ value }) => { state.opacity = Number(value); });
  bind("weights", "change", ({ checked }) => { state.weights = checked ? "mask" : "uniform"; });
  bind("outlines", "change", ({ checked }) => { state.outlines = checked; });
  byId("save").addEventListener("click", saveView);
  byId("link").addEventListener("click", async ({ target }) => {
    writeLink();
    const text = location.href.split("#")[0] + link();
    try { await navigator.clipboard.writeText(text); target.textContent = "Copied"; }
    catch { window.prompt("Link to this view", text); }
    setTimeout(() => { target.textContent = "Copy link"; }, 1500);
  });
  document.addEventListener("keydown", (event) => {
    if (!panels.length || event.ctrlKey || event.metaKey || event.altKey || /^(INPUT|SELECT|TEXTAREA)$/.test(event.target.tagName) && event.key !== "Escape") return;
    const { times } = panels[0].sample, at = state.slice[0] === "t" ? Number(state.slice.slice(1)) : -1;
    if (event.key === "Escape") ask(null, false);
    else if (event.key === "m") { state.outlines = !state.outlines; changed(); }
    else if (times.length > 1 && event.key === ".") slice(at + 1 < times.length ? `t${at + 1}` : "all");
    else if (times.length > 1 && event.key === ",") slice(at < 0 ? `t${times.length - 1}` : at ? `t${at - 1}` : "all");
  });
  window.addEventListener("hashchange", () => readLink());
  startList();
  readLink();
}

start();
