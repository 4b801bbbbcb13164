// Links: #sample/patch/slice/compared sample/source, what is not chosen left out

let wanted = null, scrolled = 0;

function link() {
  const { a, b, source, query, pinned, slice } = state;
  let patch = "-";
  if (query && pinned && query.region !== undefined) patch = `@${named(query.region)}`;
  else if (query && pinned) {
    const [top, left, bottom, right] = query.cells;
    patch = `${query.side[0]}${top},${left}${top === bottom && left === right ? "" : `-${bottom},${right}`}`;
  }
  const further = [b, source].map((name) => (name === null ? "" : `/${named(name)}`));
  return `#${named(a)}/${patch}/${slice}${further[0] || (further[1] && "/")}${further[1]}`;
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
  const [a, patch = "-", slice = "all", b, source] = hash.slice(1).split("/");
  const entry = (name) => INDEX.samples.find(({ id }) => named(id) === name) ?? null;
  const first = entry(a) ?? (INDEX.folder ? null : INDEX.samples[0]);
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
  Object.assign(state, { a: first.id, b: (b && entry(b)?.id) || null, source: source ? decoded(source) : null, slice, query: null, pinned: false });
  byId("sample").value = state.a;
  byId("compare").value = state.b ?? "";
  if (panels.length && same(opened, [state.a, state.b, state.source])) {
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
  const { sample } = panels[0], { source, sources } = sample, number = Number(state.slice.slice(1));
  state.source = source === sources[0] ? null : source.name;
  if (state.slice !== "all" && !(/^[thl]\d+$/.test(state.slice) && number < sample[AXES[state.slice[0]]].length)) state.slice = "all";
  if (!wanted) return;
  if (wanted.region !== undefined) {
    if (regionsOf(sample).some(({ name }) => name === wanted.region)) Object.assign(state, { query: wanted, pinned: true });
  } else {
    const stack = sample.stacks[PAIRS[wanted.side]];
    if (!stack && sample.payloads.pairs) return;
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
