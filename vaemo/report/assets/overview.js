// The first page: the archive in numbers, distributions, the calls to look at first, what failed, and all calls.
function tile(figure, what, more) {
  return h("div", { class: "card tile" }, h("div", { class: "what" }, what), h("div", { class: "figure" }, figure), h("div", { class: "more" }, more || ""));
}

function tiles(data) {
  const o = data.overview;
  const share = (part, all) => (all ? `${((100 * part) / all).toFixed(part && part / all < 0.01 ? 2 : 1)} %` : "–");
  const all = o.n_scored + o.n_failed;
  const skipped = o.n_not_scored_role ? `${whole(o.n_not_scored_role)} more by roles not scored` : "";
  const row = [
    tile(whole(data.n_calls), "calls", data.n_drawn < data.n_calls ? `${whole(data.n_drawn)} of them drawn` : "all of them drawn"),
    tile(whole(o.n_scored), `${COUNTED}s scored`, skipped),
    // A store of whole files may have no times.
    o.speech_s ? tile(length(o.speech_s), "of speech", "") : null,
    ...DIMENSIONS.map((name) => tile(number(o.mean[name]), `mean ${name}`, "")),
    tile(share(o.n_failed, all), "failed", o.n_failed ? plural(o.n_failed, "utterance") : "nothing failed"),
  ];
  const a = data.agreement;
  if (a) {
    const ci = a.ci95 && a.ci95.ccc_avg;
    const where = a.split === "all" ? plural(a.n, "labelled utterance") : `${a.split} split, n = ${whole(a.n)}`;
    row.push(tile(number(a.ccc_avg), "CCC with the labels", (ci && ci[0] !== null ? `${number(ci[0])} to ${number(ci[1])}, ` : "") + where));
  }
  return h("section", { class: "tiles", "aria-label": "In numbers" }, row);
}

function ranking(title, note, data, column, format, wanted) {
  // Slopes and endings need the times of utterances.
  if (data.calls[column].every((value) => value === null)) return null;
  const calls = data.calls, indices = calls.session_id.map((_, i) => i)
    .filter((i) => calls[column][i] !== null && wanted(i))
    .sort((i, j) => calls[column][i] - calls[column][j])
    .slice(0, 7);
  const dimension = FIRST;
  const items = indices.map((i) => h("li", {},
    h("a", { href: callLink(calls.session_id[i]), title: calls.session_id[i] }, calls.session_id[i]),
    sparkline(data.curves[calls.session_id[i]], dimension, data.overview.low, data.overview.high),
    h("span", { class: `value ${dimension}` }, format(calls[column][i]))));
  return h("section", { class: "card span-4" }, h("h2", {}, title), h("p", { class: "note" }, note),
    items.length ? h("ol", { class: "ranking" }, items) : h("p", { class: "note" }, "No call."));
}

// The calls that are least and most like those that the model was measured on, to be listened to.
function fit(data, end, title, note) {
  const items = data.fit[end].map((call) => h("li", {},
    h("a", { href: callLink(call.session_id), title: call.session_id }, call.session_id),
    h("span", { class: "note" }, call.novelty_of || ""),
    h("span", { class: "value" }, number(call.novelty))));
  return h("section", { class: "card span-4" }, h("h2", {}, title), h("p", { class: "note" }, note), h("ol", { class: "ranking" }, items));
}

// Calls without a known role: they wait for evidence, and can be played on their own page where it is drawn.
function unscored(data) {
  const calls = data.unscored;
  if (!calls.n) return null;
  const items = calls.session_id.map((name) => h("li", {}, data.curves[name] ? h("a", { href: callLink(name) }, name) : name));
  return h("details", { class: "card span-12" }, h("summary", {}, `Not scored, because no role is known (${whole(calls.n)})`),
    h("p", { class: "note" }, "Give the roles of their channels or voices in the table of calls (role_ch0, role_v0), or enrol the agents."),
    h("ul", { class: "fails" }, items));
}

function failures(data) {
  const list = data.overview.failures, most = Math.max(...list.map((f) => f.n), 1);
  const items = list.map((f) => h("li", {},
    h("b", {}, f.status), ` ${whole(f.n)}`,
    h("span", { class: "bar", style: `width:${Math.max((100 * f.n) / most, 1)}%` }),
    h("small", {}, f.reasons.join(" · "))));
  return h("section", { class: "card span-4" }, h("h2", {}, "Not scored, by reason"),
    h("p", { class: "note" }, list.length ? "Utterances, or whole recordings, without a score." : "Every utterance has a score."),
    h("ul", { class: "fails" }, items));
}

function overTime(width, points, low, high) {
  const height = 220, left = 40, bottom = 26, top = 12;
  const x = linear(0, Math.max(points.length - 1, 1), left + 14, width - 20), y = linear(low, high, height - bottom, top);
  const picture = s("svg", { viewBox: `0 0 ${width} ${height}`, width, height, role: "img", "aria-label": `Mean ${listed(DIMENSIONS)} of the calls over time` });
  for (const tick of ticks(low, high, 5)) {
    picture.append(s("line", { x1: left, x2: width, y1: y(tick), y2: y(tick), class: "grid-line" }));
    picture.append(s("text", { x: left - 8, y: y(tick) + 4, "text-anchor": "end" }, number(tick, 1)));
  }
  const every = Math.ceil(points.length / Math.max(Math.floor(width / 90), 1));
  points.forEach((point, i) => {
    const anchor = x(i) > width - 45 ? "end" : "middle";
    if (i % every === 0) picture.append(s("text", { x: anchor === "end" ? width : x(i), y: height - 7, "text-anchor": anchor }, point.period));
  });
  for (const name of DIMENSIONS) {
    picture.append(s("polyline", { points: points.map((p, i) => `${x(i)},${y(p[name])}`).join(" "), fill: "none", stroke: `var(--${name})`, "stroke-width": 2 }));
    points.forEach((p, i) => picture.append(s("circle", { cx: x(i), cy: y(p[name]), r: 3.5, fill: `var(--${name})` },
      s("title", {}, `${p.period}: ${name} ${number(p[name])}, ${plural(p.n, "call")}`))));
  }
  return picture;
}

const ENDS = { valence: "Unpleasant to pleasant", arousal: "Calm to excited", dominance: "Weak to strong" };

// The plane of two targets; any two, where there are more.
function together(o) {
  const chosen = [FIRST, SECOND], picture = h("div", {});
  const draw = (width) => density(Math.min(width, 290), (o.planes && o.planes[chosen.join(",")]) || o.plane, o.low, o.high, ...chosen);
  const heading = () => `${capital(chosen[0])} and ${chosen[1]} together`;
  const title = h("h2", {}, heading()), axes = [0, 1].map((axis) => h("select", { "aria-label": axis ? "Upwards" : "To the right", onchange: (event) => {
    if (event.target.value === chosen[1 - axis]) chosen[1 - axis] = chosen[axis];
    chosen[axis] = event.target.value;
    axes.forEach((select, k) => { select.value = chosen[k]; });
    title.textContent = heading();
    picture.replaceChildren(draw(Math.floor(picture.clientWidth)));
  } }, DIMENSIONS.map((name) => h("option", { value: name, selected: name === chosen[axis] }, name))));
  return h("section", { class: "card span-4" }, title, h("p", { class: "note" }, `Darker where more ${COUNTED}s are.`),
    DIMENSIONS.length > 2 ? h("p", { class: "note" }, axes) : null, responsive(picture, draw));
}

function overviewPage(data) {
  const o = data.overview;
  const chart = (draw) => responsive(h("div", {}), draw);
  const page = [h("h1", {}, `${capital(listed(DIMENSIONS))} of the calls`)];
  page.push(tiles(data));
  page.push(h("div", { class: "grid" },
    ...DIMENSIONS.map((name) => h("section", { class: "card span-4" },
      h("h2", {}, capital(name)),
      h("p", { class: "note" }, capital(`${ENDS[name] ? `${ENDS[name]}; ` : ""}${COUNTED}s by score.`)),
      chart((width) => histogram(width, o.histogram[name], o.low, o.high, name, data.low_at[name])))),
    SECOND ? together(o) : null,
    ...(data.fit ? [
      fit(data, "most", "Least fitting calls", "Novelty: the share of known calls that are less unusual; and what differs most."),
      fit(data, "least", "Best fitting calls", "Most like those that the model was measured on."),
    ] : []),
    ranking("Lowest calls", data.of_calls ? `${capital(FIRST)} of the whole call.` : `Mean ${FIRST}, longer utterances counting more.`, data, ofCall(FIRST), (v) => number(v), () => true),
    ...(data.of_calls ? [] : [ranking("Most falling calls", `Change of ${FIRST} per minute, from ${data.min_scored} utterances on.`, data, `${FIRST}_slope_per_min`, (v) => signed(v, 2),
      (i) => data.calls.n_scored[i] >= data.min_scored && data.calls[`${FIRST}_slope_per_min`][i] < 0),
    ranking("Worst endings", `${capital(FIRST)} weighted to the end (half-life ${data.half_life_s} s).`, data, `${FIRST}_end_weighted`, (v) => number(v), () => true)])));
  const time = data.over_time.length > 1
    ? h("section", { class: `card ${o.failures.length ? "span-8" : "span-12"}` }, h("h2", {}, "Calls over time"), legend(DIMENSIONS.map((name) => [name, `var(--${name})`])),
      chart((width) => overTime(width, data.over_time, o.low, o.high)))
    : null;
  if (time || o.failures.length) page.push(h("div", { class: "grid" }, time, o.failures.length ? failures(data) : null));
  page.push(unscored(data), callsTable(data));
  return page.filter(Boolean);
}

function legend(entries) {
  return h("ul", { class: "legend" }, entries.map(([name, colour, dashed]) =>
    h("li", {}, h("i", { style: `border-color:${colour}`, class: dashed ? "dashed" : "" }), name)));
}
