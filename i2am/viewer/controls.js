// Controls: what the page offers for the samples it shows, and which of it is chosen.

let linkTimer = 0;

function build() {
  const { sample } = panels[0], pairs = panels.flatMap(({ side }, i) => (side === "generated" ? [i] : [])).map((i) => {
    const together = panels.slice(i, panels[i + 1]?.side === "reference" ? i + 2 : i + 1);
    const pair = make("div", { className: "pair" }, ...together.map(({ figure }) => figure));
    // as wide as their shapes, so that both are equally high
    const aspects = together.map(({ picture }) => picture.width / picture.height);
    pair.style.gridTemplateColumns = aspects.map((aspect) => `minmax(0, ${aspect}fr)`).join(" ");
    pair.style.setProperty("--aspects", aspects.reduce((sum, aspect) => sum + aspect));
    const heading = compared() ? [make("h2", { textContent: panels[i].sample.id })] : [];
    return make("section", { className: "one" }, ...heading, pair);
  });
  byId("pictures").replaceChildren(...pairs);
  byId("pictures").classList.toggle("two", compared());
  panels.forEach(listen);

  byId("source").replaceChildren(...sample.sources.map(({ name }, i) => make("option", { value: i ? name : "", textContent: name })));
  byId("source-row").hidden = sample.sources.length < 2;
  const regions = regionsOf(sample);
  byId("regions").replaceChildren(...(regions.length ? [null, ...regions.map(({ name }) => name)] : []).map((name) =>
    chip(name ?? "Everything", () => ask(name === null ? null : { region: name }, name !== null), name ?? "")));
  byId("weighted").hidden = !sample.stacks.r2g_mask && !sample.stacks.g2r_mask;
  byId("measured").hidden = !sample.stacks.share || !sample.stacks.r2g;
  byId("question").hidden = ["source-row", "weighted", "measured"].every((id) => byId(id).hidden) && !regions.length;
  byId("time").max = sample.times.length;
  byId("time").hidden = byId("time-name").parentElement.hidden = sample.times.length < 2;
  byId("head-row").hidden = sample.heads.length < 2;
  byId("heads").replaceChildren(chip("all", () => slice("all"), "all"),
    ...sample.heads.map((name, i) => chip(String(i), () => slice(`h${i}`), `h${i}`, name)));
  byId("layer-row").hidden = sample.layers.length < 2;
  byId("slice").hidden = !sample.maps.length || [sample.times, sample.heads, sample.layers].every(({ length }) => length < 2);
  byId("drawing").hidden = !sample.maps.length;
  byId("layer").replaceChildren(make("option", { value: "all", textContent: "all layers" }),
    ...shortened(sample.layers).map((name, i) => make("option", { value: `l${i}`, textContent: name, title: sample.layers[i] })));
  byId("facts").replaceChildren(...Object.entries(sample.facts).flatMap(([name, value]) =>
    [make("dt", { textContent: name }), make("dd", { textContent: value })]));
  byId("notes").replaceChildren(...sample.notes.map((text) => make("li", { textContent: text })));
  // the others stand beside the pictures
  const others = Object.keys(sample.scores).filter((name) => !(name in sample.scored) || sample.scores[name].value === null);
  byId("facts").append(...others.flatMap((name) => [make("dt", { textContent: name }), make("dd", { textContent: scoreText(sample.scores[name]) })]));
  byId("facts").parentElement.hidden = !byId("facts").children.length && !sample.notes.length;
  describe();
  sync();
}

// Layers differ in what comes first: an ending that all have says nothing.
function shortened(names) {
  const parts = names.map((name) => name.split(".").reverse()), [first = []] = parts;
  // a name keeps at least its first word
  const differs = (word, at) => parts.some((one) => one.length === at + 1 || one[at] !== word);
  return parts.map((one) => one.slice(first.findIndex(differs)).reverse().join("."));
}

function describe() {
  for (const { stage, sample, side } of panels) {
    const what = `${SIDES[side].title} picture${compared() ? ` of ${sample.id}` : ""}`;
    const live = askable(sample);
    stage.classList.toggle("live", live);
    stage.setAttribute("role", live ? "application" : "img");
    if (!live) {
      stage.setAttribute("aria-label", `${what}. Patches cannot be pointed at.`);
      continue;
    }
    stage.tabIndex = 0;
    const [rows, columns] = sample.stacks[PAIRS[side]].asked;
    stage.setAttribute("aria-label", `${what}, ${rows} rows by ${columns} columns of patches. Arrow keys move the patch, with Shift they widen it, Enter holds it, Escape clears it.`);
  }
}

function chip(text, action, value, label) {
  const button = make("button", { type: "button", textContent: text, value });
  if (label) button.setAttribute("aria-label", label);
  button.addEventListener("click", action);
  return button;
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
  byId("source").value = state.source ?? "";
  byId("layer").value = state.slice[0] === "l" ? state.slice : "all";
  byId("threshold").value = threshold;
  byId("threshold-value").textContent = threshold.toFixed(2);
  byId("opacity").value = opacity;
  byId("opacity-value").textContent = opacity.toFixed(2);
  byId("weights").checked = state.weights === "mask";
  byId("spread").checked = state.measure === "spread";
  byId("outlines").checked = state.outlines;
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
