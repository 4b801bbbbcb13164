// The samples: where their content is, and the panels of those that are shown.

const byId = (id) => document.getElementById(id);
const [status, reading, filter, sort, order, count, cards] =
  ["status", "reading", "filter", "sort", "order", "count", "cards"].map(byId);
const INDEX = JSON.parse(byId("index").textContent), COLORS = bytesOf(INDEX.colors);
const loaded = new Map(), waiting = new Map(), KEPT = 4;
let opening = 0, opened = null;

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

function load(entry) {
  if (!loaded.has(entry.id)) {
    const sample = read(entry);
    sample.catch(() => loaded.delete(entry.id));
    loaded.set(entry.id, sample);
    if (loaded.size > KEPT) loaded.delete(loaded.keys().next().value);
  }
  return loaded.get(entry.id);
}

async function read(entry) {
  const content = await documentOf(entry);
  const every = content.sources.map(() => ({}));
  const sample = {
    ...content,
    // the one chosen, where this sample has it
    get source() { return content.sources.find(({ name }) => name === state.source) ?? content.sources[0]; },
    get stacks() { return every[content.sources.indexOf(this.source)]; },
  };
  const take = async (part) => {
    if (!content.payloads[part]) return;
    const buffer = await unpacked(content.payloads[part]);
    for (const map of content.maps) if (map.part === part) every[map.source][map.name] = new Stack(map, buffer);
  };
  await take("overall");
  sample.pairs = () => (sample.unpacking ??= take("pairs"));
  return sample;
}

async function open() {
  const turn = ++opening, entries = [state.a, state.b].map((id) => INDEX.samples.find((entry) => entry.id === id)).filter(Boolean);
  ready = false;
  status.dataset.ready = false;
  try {
    const samples = await Promise.all(entries.map(load));
    // a word has no picture
    const next = samples.flatMap((sample) => Object.keys(SIDES).map((side) => new Panel(sample, side))).filter(({ picture }) => picture);
    await Promise.all(next.map((panel) => panel.load()));
    if (turn !== opening) return;
    panels = next;
    settle();
    opened = [state.a, state.b, state.source];
    build();
    show();
    await new Promise((resolve) => requestAnimationFrame(resolve));
    await Promise.all(samples.map((sample) => sample.pairs()));
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
