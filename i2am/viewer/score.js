// The score of each side, and what it is a score of.

const COUNTED = { share: "share", r2g: "all patches", r2g_mask: "masked object", g2r: "all patches", g2r_mask: "painted part" };

// Name of the overall map that the controls choose for a side.
function overall({ sample, side }) {
  const { share, r2g } = sample.stacks;
  if (side === "generated" && share && (state.measure === "share" || !r2g)) return "share";
  const name = SIDES[side].map, masked = `${name}_mask`;
  return state.weights === "mask" && sample.stacks[masked] ? masked : name;
}

// Scores are computed for whole maps, so beside any other map the page says what they belong to.
function scoreOf(panel, stack) {
  const { scored, scores, source, sources } = panel.sample, chosen = overall(panel);
  // of the first source, which is the reference
  if (source !== sources[0]) return null;
  const known = Object.keys(scores).filter((name) => SIDES[panel.side].maps.test(scored[name] ?? ""));
  const name = known.find((one) => scored[one] === chosen) ?? known[0];
  if (name === undefined) return null;
  const same = stack?.name === scored[name];
  const scope = same && state.slice === "all" ? null : same ? "whole run" : `whole run, ${COUNTED[scored[name]]}`;
  return { ...scores[name], scope };
}

function rate(panel, stack) {
  const found = scoreOf(panel, stack);
  panel.score.title = found?.reason ?? "";
  panel.score.replaceChildren(...(found ? ["IMACS", make("sub", { textContent: panel.side[0] }),
    ` ${found.value === null ? "undefined" : signed(found.value)}`] : []),
  ...(found?.scope ? [make("span", { className: "scope", textContent: ` (${found.scope})` })] : []));
}

function scoreText({ value, reason }) {
  return value === null ? `undefined: ${reason}` : signed(value);
}
