// The page comes to life: listeners, then what the link asks for.

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
  byId("source").addEventListener("change", (event) => go({ source: event.target.value || null }));
  byId("compare").addEventListener("change", (event) => go({ b: event.target.value || null }));
  const bind = (id, event, action) => byId(id).addEventListener(event, ({ target }) => { action(target); changed(); });
  bind("time", "input", ({ value }) => { state.slice = Number(value) ? `t${value - 1}` : "all"; });
  bind("layer", "change", ({ value }) => { state.slice = value; });
  bind("threshold", "input", ({ value }) => { state.threshold = Number(value); });
  bind("opacity", "input", ({ value }) => { state.opacity = Number(value); });
  bind("weights", "change", ({ checked }) => { state.weights = checked ? "mask" : "uniform"; });
  bind("spread", "change", ({ checked }) => { state.measure = checked ? "spread" : "share"; });
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
  window.addEventListener("resize", () => panels.forEach((panel) => panel.thin()));
  window.addEventListener("hashchange", () => readLink());
  startList();
  readLink();
}

start();
