// The page of one call: the targets over time by who speaks, its way through the plane, its sound.
function callPage(data, session) {
  const curve = data.curves[session], o = data.overview, calls = data.calls;
  const rows = calls.session_id.map((name, i) => (name === session ? i : -1)).filter((i) => i >= 0);
  const scored = curve.id.map((_, i) => i).filter((i) => curve[FIRST][i] !== null);
  const colour = (i) => `var(--who-${Math.min(curve.speaks[i], 5)})`;
  const hasLabels = DIMENSIONS.some((name) => curve[`label_${name}`]);
  const state = { at: null, draw: null };
  const player = data.audio[session] ? makePlayer(data.audio[session]) : null;

  const now = h("div", { class: "now", role: "status" });
  function describe() {
    const i = state.at;
    if (i === null) {
      now.replaceChildren(h("span", { class: "hint" }, `Point at an utterance, or focus the chart and use the arrow keys${player ? "; click or Enter plays it" : ""}.`));
      return;
    }
    const when = curve.timed ? `${clock(curve.start[i])} to ${clock(curve.end[i])}` : `utterance ${curve.start[i]}`;
    const value = (name) => h("span", { class: name }, `${name} `, h("b", {}, number(curve[name][i])),
      curve[`${name}_low`] ? ` (${number(curve[`${name}_low`][i])} to ${number(curve[`${name}_high`][i])})` : "",
      curve[`${name}_sd`] ? ` ± ${number(curve[`${name}_sd`][i])}` : "",
      curve[`label_${name}`] && curve[`label_${name}`][i] !== null ? ` (label ${number(curve[`label_${name}`][i])})` : "");
    now.replaceChildren(h("b", {}, when), h("span", {}, curve.who[curve.speaks[i]]),
      ...(curve[FIRST][i] === null ? [h("span", {}, curve.status[i])] : DIMENSIONS.map(value)),
      h("span", { class: "hint" }, curve.id[i]));
  }
  function select(i, play) {
    state.at = i;
    describe();
    chart.dispatchEvent(new CustomEvent("selected"));
    if (!play || !player || !curve.timed) return;
    const from = curve.from_s - (curve.offset ? curve.offset[i] : 0);
    player.play(from + curve.start[i], from + curve.end[i], curve.recording ? curve.recording[i] : 0);
  }

  const chart = h("div", { class: "chart", tabindex: 0, role: "group",
    "aria-label": `${capital(listed(DIMENSIONS))} over the call. Left and right arrow keys go from utterance to utterance.` });
  chart.addEventListener("keydown", (event) => {
    const place = scored.indexOf(state.at);
    const to = { ArrowRight: place + 1, ArrowLeft: place < 0 ? scored.length - 1 : place - 1, Home: 0, End: scored.length - 1 }[event.key];
    if (to !== undefined && scored[to] !== undefined) select(scored[to]);
    else if ((event.key === "Enter" || event.key === " ") && state.at !== null) select(state.at, true);
    else return;
    event.preventDefault();
  });
  responsive(chart, (width) => timeChart(width, { data, curve, scored, colour, state, select, chart }));
  describe();

  const order = [...new Set(chosenCalls(data).map((i) => calls.session_id[i]))];
  const place = order.indexOf(session);
  const neighbour = (step, text) => {
    const name = order[place + step];
    return place >= 0 && name !== undefined ? h("a", { href: callLink(name), title: name }, text) : null;
  };
  const entries = curve.who.map((name, i) => [name, `var(--who-${Math.min(i, 5)})`]);
  if (hasLabels) entries.push(["label", "var(--muted)", true]);
  return [
    h("nav", { class: "crumbs", "aria-label": "Calls" }, h("a", { href: "#" }, "← All calls"), h("span", { class: "spacer" }), neighbour(-1, "← Previous"), neighbour(1, "Next →")),
    h("h1", {}, session),
    h("div", { class: "grid" },
      h("section", { class: "card span-8" }, h("h2", {}, "Over the call"), legend(entries), chart, now, player ? player.node : null),
      h("div", { class: "span-4", style: "display:grid;gap:16px;align-content:start" },
        SECOND && h("section", { class: "card" }, h("h2", {}, "Way through the plane"), h("p", { class: "note" }, "From the start (faint) to the end (ringed)."),
          responsive(h("div", {}), (width) => wayThroughPlane(width, o, curve, scored, colour))),
        ...rows.filter((i) => calls.n_scored[i]).map((i) => callFacts(data, i, curve)))),
    utteranceTable(curve, player, select),
  ];
}

function timeChart(width, { data, curve, scored, colour, state, select, chart }) {
  const o = data.overview, left = 40, right = 12, panel = 190, gap = 36, strip = 14;
  const stripTop = DIMENSIONS.length * (panel + gap) + 2, height = stripTop + curve.who.length * strip + 30;
  const to = Math.max(...curve.end, 1) + (curve.timed ? 0 : 0.5);
  // From the start of the recording, but for a session that is a small piece of it.
  const from = !curve.timed ? 0.5 : curve.start[0] > 2 * (to - curve.start[0]) ? curve.start[0] : 0;
  const x = linear(from, to, left, width - right);
  const middle = (i) => x((curve.start[i] + curve.end[i]) / 2);
  const picture = s("svg", { viewBox: `0 0 ${width} ${height}`, width, height, "aria-hidden": "true" });
  const times = curve.timed ? timeTicks(from, to, width / 90) : ticks(1, to, width / 90).filter(Number.isInteger);
  for (const tick of times) {
    picture.append(s("line", { x1: x(tick), x2: x(tick), y1: 18, y2: height - 22, class: "grid-line" }));
    picture.append(s("text", { x: x(tick), y: height - 6, "text-anchor": "middle" }, curve.timed ? clock(tick) : tick));
  }
  const cursor = s("line", { y1: 18, y2: height - 22, stroke: "var(--ink)", "stroke-opacity": 0.5, visibility: "hidden" });
  picture.append(cursor);
  const rings = DIMENSIONS.map((name, k) => {
    const top = k * (panel + gap) + 18, y = linear(o.low, o.high, top + panel, top);
    picture.append(s("text", { x: left, y: top - 5, class: "strong" }, name));
    for (const tick of ticks(o.low, o.high, 4)) {
      picture.append(s("line", { x1: left, x2: width - right, y1: y(tick), y2: y(tick), class: "grid-line" }));
      picture.append(s("text", { x: left - 8, y: y(tick) + 4, "text-anchor": "end" }, number(tick, 1)));
    }
    const low = data.low_at[name];
    if (low !== undefined) picture.append(s("line", { x1: left, x2: width - right, y1: y(low), y2: y(low), stroke: "var(--muted)", "stroke-opacity": 0.6, "stroke-dasharray": "3 4" }));
    const label = curve[`label_${name}`];
    if (label) {
      const points = label.map((value, i) => (value === null ? null : `${middle(i)},${y(value)}`)).filter(Boolean);
      picture.append(s("polyline", { points: points.join(" "), fill: "none", stroke: "var(--muted)", "stroke-width": 1.8, "stroke-dasharray": "1 4", "stroke-linecap": "round" }));
    }
    curve.who.forEach((_, who) => {
      const own = scored.filter((i) => curve.speaks[i] === who);
      if (!own.length) return;
      const ends = (end) => own.filter((i) => curve[`${name}_${end}`][i] !== null).map((i) => `${middle(i)},${y(curve[`${name}_${end}`][i])}`);
      if (curve[`${name}_low`]) picture.append(s("polygon", { points: [...ends("high"), ...ends("low").reverse()].join(" "), fill: colour(own[0]), "fill-opacity": 0.1 }));
      picture.append(s("polyline", { points: own.map((i) => `${middle(i)},${y(curve[name][i])}`).join(" "), fill: "none", stroke: colour(own[0]), "stroke-opacity": 0.45, "stroke-width": 1.5, "stroke-linejoin": "round" }));
      for (const i of own) {
        const spread = curve[`${name}_sd`] ? curve[`${name}_sd`][i] : null;
        if (spread !== null) picture.append(s("line", { x1: middle(i), x2: middle(i), y1: y(Math.max(curve[name][i] - spread, o.low)), y2: y(Math.min(curve[name][i] + spread, o.high)), stroke: colour(i), "stroke-opacity": 0.35, "stroke-width": 5 },
          s("title", {}, `deviation over the models: ${number(spread)}`)));
        if (curve.timed) picture.append(s("line", { x1: x(curve.start[i]), x2: x(curve.end[i]), y1: y(curve[name][i]), y2: y(curve[name][i]), stroke: colour(i), "stroke-width": 3, "stroke-linecap": "round", "stroke-opacity": 0.8 }));
        picture.append(s("circle", { cx: middle(i), cy: y(curve[name][i]), r: 3.4, fill: colour(i) }));
      }
    });
    const i = curve.lowest[name];
    if (i !== null) {
      const end = middle(i) > width * 0.7, up = y(curve[name][i]) > top + panel - 24;
      picture.append(s("circle", { cx: middle(i), cy: y(curve[name][i]), r: 8, fill: "none", stroke: "var(--ink)", "stroke-width": 1.6 }));
      picture.append(s("text", { x: middle(i) + (end ? -13 : 13), y: y(curve[name][i]) + (up ? -10 : 16), "text-anchor": end ? "end" : "start", class: "strong halo" },
        `lowest ${number(curve[name][i])}${curve.timed ? ` at ${clock(curve.start[i])}` : ""}`));
    }
    const ring = s("circle", { r: 6.5, fill: "var(--surface)", "stroke-width": 3, visibility: "hidden" });
    picture.append(ring);
    return { ring, y, name };
  });
  curve.id.forEach((_, i) => picture.append(s("rect", {
    x: curve.timed ? x(curve.start[i]) : x(curve.start[i] - 0.4), width: Math.max(curve.timed ? x(curve.end[i]) - x(curve.start[i]) : x(0.8) - x(0), 1.5),
    y: stripTop + curve.speaks[i] * strip + 2, height: strip - 4, rx: 2, fill: colour(i), "fill-opacity": curve[FIRST][i] === null ? 0.25 : 0.9,
  })));
  const mark = () => {
    const i = state.at, shown = i !== null ? "visible" : "hidden";
    cursor.setAttribute("visibility", shown);
    if (i !== null) { cursor.setAttribute("x1", middle(i)); cursor.setAttribute("x2", middle(i)); }
    for (const { ring, y, name } of rings) {
      const has = i !== null && curve[name][i] !== null;
      ring.setAttribute("visibility", has ? "visible" : "hidden");
      if (has) { ring.setAttribute("cx", middle(i)); ring.setAttribute("cy", y(curve[name][i])); ring.setAttribute("stroke", colour(i)); }
    }
  };
  const nearest = (event) => {
    if (!scored.length) return null;
    const px = ((event.clientX - picture.getBoundingClientRect().left) * width) / picture.getBoundingClientRect().width;
    return scored.reduce((best, i) => (Math.abs(middle(i) - px) < Math.abs(middle(best) - px) ? i : best));
  };
  picture.addEventListener("pointermove", (event) => { const i = nearest(event); if (i !== null && i !== state.at) select(i); });
  picture.addEventListener("click", (event) => { const i = nearest(event); if (i !== null) select(i, true); });
  if (state.mark) chart.removeEventListener("selected", state.mark);
  state.mark = mark;
  chart.addEventListener("selected", mark);
  mark();
  return picture;
}

function wayThroughPlane(width, o, curve, scored, colour) {
  const { picture, x, y, finish } = planeFrame(Math.min(width, 320), o.low, o.high);
  picture.setAttribute("aria-label", `The call's way through the plane of ${FIRST} and ${SECOND}`);
  scored.forEach((i, place) => {
    const share = 0.15 + (0.85 * (place + 1)) / scored.length;
    if (place) {
      const before = scored[place - 1];
      picture.append(s("line", { x1: x(curve[FIRST][before]), y1: y(curve[SECOND][before]), x2: x(curve[FIRST][i]), y2: y(curve[SECOND][i]), stroke: "var(--muted)", "stroke-opacity": 0.5 * share }));
    }
    picture.append(s("circle", { cx: x(curve[FIRST][i]), cy: y(curve[SECOND][i]), r: 4, fill: colour(i), "fill-opacity": share }));
  });
  if (scored.length) {
    const last = scored[scored.length - 1];
    picture.append(s("circle", { cx: x(curve[FIRST][last]), cy: y(curve[SECOND][last]), r: 7.5, fill: "none", stroke: "var(--ink)", "stroke-width": 1.6 }));
  }
  return finish();
}

function callFacts(data, i, curve) {
  const calls = data.calls, known = data.of_calls ? [] : DIMENSIONS;
  const line = (title, name, format) => known.length === 0 ? [] : [h("dt", {}, title), ...known.map((d) => h("dd", { class: d }, format(calls[`${d}_${name}`][i])))];
  return h("section", { class: "card" }, h("h2", {}, calls.role[i] || "The call"),
    h("p", { class: "note" }, `${plural(calls.n_scored[i], "utterance")} scored, ${clock(calls.talk_s[i])} of speech${calls.n_failed[i] ? `, ${whole(calls.n_failed[i])} failed` : ""}`),
    h("dl", { class: "facts", style: `grid-template-columns: minmax(0, 1fr) repeat(${Math.max(known.length, 1)}, auto)` }, known.length ? h("span", {}) : null, ...known.map((d) => h("span", { class: "head" }, d)),
      line("mean", "mean", number), line("lowest", "min", number), line("lowest at", "min_at_s", (v) => clock(v === null ? v : v - curve.from_s)), line("per minute", "slope_per_min", (v) => signed(v, 2)),
      line("low for", "below_s", clock), line("towards the end", "end_weighted", number),
      data.session_targets.map((name) => [h("dt", {}, `${name}, of the call`), h("dd", { style: `grid-column: span ${Math.max(known.length, 1)}` }, number(calls[name][i]))]).flat()));
}

// Plays a call: the link of its recording, or those of several, null where one is not there.
function makePlayer(links) {
  const sources = [].concat(links);
  let shown = sources.findIndex((source) => source !== null);
  const audio = h("audio", { controls: true, preload: "metadata", src: sources[shown] });
  const problem = h("p", { class: "note", hidden: true }, "This browser cannot play the recording, or it is no longer beside the report.");
  let stop = null;
  audio.addEventListener("timeupdate", () => { if (stop !== null && audio.currentTime >= stop) { audio.pause(); stop = null; } });
  audio.addEventListener("error", () => { problem.hidden = false; });
  audio.addEventListener("canplay", () => { problem.hidden = true; });
  const play = (start, end, which) => {
    if (!sources[which]) { problem.hidden = false; return; }
    if (which !== shown) { shown = which; audio.src = sources[which]; }
    const begin = () => { audio.currentTime = start; stop = end; audio.play().catch((error) => { if (error.name === "NotSupportedError") problem.hidden = false; }); };
    if (audio.readyState >= 1) begin();
    else { audio.addEventListener("loadedmetadata", begin, { once: true }); audio.load(); }
  };
  return { node: h("div", {}, audio, problem), play };
}

function utteranceTable(curve, player, select) {
  const labelled = DIMENSIONS.filter((name) => curve[`label_${name}`]);
  const heads = [["Utterance", "left"], ["Who", "left"], [curve.timed ? "From" : "Place", ""], ...(curve.timed ? [["To", ""]] : []), ...DIMENSIONS.map((name) => [capital(name), ""]),
    ...labelled.map((name) => [`${name} label`, ""]), ["Status", "left"], ...(player ? [["", ""]] : [])];
  const details = h("details", { class: "card" }, h("summary", {}, `Utterances (${curve.id.length})`));
  // Built when it is opened: most calls are looked at, few are read line by line.
  details.addEventListener("toggle", () => {
    if (!details.open || details.querySelector("table")) return;
    const body = curve.id.map((id, i) => h("tr", {}, h("td", { class: "left" }, id), h("td", { class: "left" }, curve.who[curve.speaks[i]]),
      h("td", {}, curve.timed ? clock(curve.start[i]) : curve.start[i]), curve.timed ? h("td", {}, clock(curve.end[i])) : null,
      ...DIMENSIONS.map((name) => h("td", {}, number(curve[name][i]))),
      ...labelled.map((name) => h("td", {}, number(curve[`label_${name}`][i]))), h("td", { class: "left" }, curve.status[i]),
      player ? h("td", {}, h("button", { type: "button", "aria-label": `Play ${id}`, onclick: () => select(i, true) }, "Play")) : null));
    details.append(h("div", { class: "scroll" }, h("table", {}, h("thead", {}, h("tr", {}, heads.map(([title, side]) => h("th", { class: side, scope: "col" }, title)))), h("tbody", {}, body))));
  });
  return details;
}
