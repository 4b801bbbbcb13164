// The samples of a folder: thumbnails, sorted and filtered.

let descending = true;

function listed() {
  const words = filter.value.toLocaleLowerCase().split(/\s+/).filter(Boolean), by = sort.value;
  const kept = INDEX.samples.filter(({ id }) => words.every((word) => id.toLocaleLowerCase().includes(word)));
  if (!by) return kept;
  const value = ({ scores }) => scores?.[by]?.value ?? null, way = descending ? -1 : 1;
  // what has no score comes last, whichever way
  return kept.sort((one, other) => {
    const [first, second] = [value(one), value(other)];
    if (first === null || second === null) return (first === null) - (second === null);
    return way * (first - second);
  });
}

function card(entry) {
  const by = sort.value, score = by ? entry.scores?.[by] : null;
  const value = score ? (score.value === null ? "undefined" : signed(score.value)) : "";
  const image = make("img", { alt: "", loading: "lazy", decoding: "async", width: 176, height: 118, src: entry.thumbnail });
  const link = make("a", { href: `#${named(entry.id)}` }, image,
    make("span", { className: "name", textContent: entry.id, title: entry.id }),
    make("span", { className: "value", textContent: value, title: score?.reason ?? "" }));
  return make("li", {}, link);
}

function showList() {
  const entries = listed();
  order.disabled = !sort.value;
  order.textContent = descending ? "Highest first" : "Lowest first";
  order.setAttribute("aria-pressed", String(!descending));
  const all = INDEX.samples.length, samples = all === 1 ? "sample" : "samples";
  count.textContent = `${entries.length === all ? "" : `${entries.length} of `}${all} ${samples}`;
  cards.replaceChildren(...entries.map(card));
  status.dataset.ready = true;
  status.textContent = JSON.stringify({ ready: true, list: entries.map(({ id }) => id) });
}

function startList() {
  const names = [...new Set(INDEX.samples.flatMap(({ scores }) => Object.keys(scores ?? {})))];
  sort.replaceChildren(make("option", { value: "", textContent: "run order" }),
    ...names.map((name) => make("option", { value: name, textContent: name })));
  filter.addEventListener("input", showList);
  sort.addEventListener("change", showList);
  order.addEventListener("click", () => { descending = !descending; showList(); });
}
