// The table of calls: searched, filtered by role, sorted by any column, a page at a time.
const ROWS = 25;
const callLink = (session) => `#call=${encodeURIComponent(session)}`;
const table = { search: "", role: "", sort: ofCall(FIRST), direction: 1, page: 0 };

function callColumns(data) {
  const low = data.low_at;
  return [
    ["session_id", "Call", "left", null, ""],
    ["role", "Role", "left", (v) => v || "–", "Who of the call this line is about"],
    ["date", "Date", "left", (v) => v || "–", ""],
    ["n_scored", "Scored", "", whole, "Utterances with a score"],
    ["n_failed", "Failed", "", whole, "Utterances that could not be scored"],
    ["talk_s", "Speech", "", clock, "Minutes and seconds"],
    [`${FIRST}_mean`, capital(FIRST), "", number, "Mean, weighted by length"],
    ["curve", "", "left", null, `${capital(FIRST)} over the call`],
    [`${FIRST}_min`, "Lowest", "", number, `Lowest ${FIRST} of an utterance`],
    [`${FIRST}_slope_per_min`, "Per min", "", (v) => signed(v, 2), `Slope of ${FIRST} per minute`],
    [`${FIRST}_end_weighted`, "End", "", number, `${capital(FIRST)}, later speech counting more`],
    [`${FIRST}_below_s`, "Low for", "", clock, `Speech scored below ${low[FIRST]} in ${FIRST}`],
    ...DIMENSIONS.slice(1).flatMap((name) => [
      [`${name}_mean`, capital(name), "", number, "Mean, weighted by length"],
      [`${name}_end_weighted`, "End", "", number, `${capital(name)}, later speech counting more`],
    ]),
    ...data.session_targets.map((name) => [name, capital(name), "", number, "Of the whole call"]),
  ].filter(([name]) => (name === "curve" && !data.of_calls) || (data.calls[name] && data.calls[name].some((v) => v !== null)));
}

function chosenCalls(data) {
  const calls = data.calls, words = table.search.toLowerCase().split(/\s+/).filter(Boolean);
  const column = calls[table.sort];
  const place = (value) => (typeof value === "string" ? value.toLowerCase() : value);
  return calls.session_id.map((_, i) => i)
    .filter((i) => (!table.role || calls.role[i] === table.role)
      && words.every((word) => calls.session_id[i].toLowerCase().includes(word)))
    .sort((i, j) => {
      const [a, b] = [place(column[i]), place(column[j])];
      // What is not known comes last, whichever way the column is sorted.
      if (a === null || b === null) return (a === null) - (b === null);
      return table.direction * (a < b ? -1 : a > b ? 1 : 0) || i - j;
    });
}

function callsTable(data) {
  const columns = callColumns(data);
  const body = h("tbody", {}), count = h("span", { class: "count", role: "status" }), pager = h("div", { class: "pager" });
  const heads = columns.map(([name, title, side, , hint]) => {
    if (name === "curve") return h("th", { class: side, title: hint }, h("span", {}, title));
    const button = h("button", { type: "button", title: hint, onclick: () => {
      table.direction = table.sort === name ? -table.direction : name.endsWith("_id") || name === "role" || name === FIRST || name.startsWith(`${FIRST}_`) ? 1 : -1;
      table.sort = name; table.page = 0; refresh();
    } }, title);
    return h("th", { class: side, scope: "col", "data-name": name }, button);
  });

  function refresh() {
    const chosen = chosenCalls(data), pages = Math.max(Math.ceil(chosen.length / ROWS), 1);
    table.page = Math.min(table.page, pages - 1);
    const shown = chosen.slice(table.page * ROWS, (table.page + 1) * ROWS);
    body.replaceChildren(...shown.map((i) => h("tr", {}, columns.map(([name, , side, format]) => {
      const session = data.calls.session_id[i];
      if (name === "session_id") return h("td", { class: side }, h("a", { href: callLink(session), title: session }, h("span", { class: "name" }, session)));
      if (name === "curve") return h("td", { class: side }, sparkline(data.curves[session], FIRST, data.overview.low, data.overview.high));
      return h("td", { class: side }, format(data.calls[name][i]));
    }))));
    for (const head of heads) {
      if (head.dataset.name === table.sort) head.setAttribute("aria-sort", table.direction > 0 ? "ascending" : "descending");
      else head.removeAttribute("aria-sort");
    }
    const all = data.calls.session_id.length;
    count.textContent = chosen.length === all ? plural(all, "line") : `${whole(chosen.length)} of ${plural(all, "line")}`;
    const turn = (step, text) => h("button", { type: "button", disabled: table.page + step < 0 || table.page + step >= pages,
      onclick: () => { table.page += step; refresh(); } }, text);
    pager.replaceChildren(turn(-1, "Previous"), h("span", {}, `page ${table.page + 1} of ${whole(pages)}`), turn(1, "Next"));
    pager.hidden = pages === 1;
  }

  const roles = [...new Set(data.calls.role.filter(Boolean))].sort();
  const search = h("input", { type: "search", placeholder: "Search calls", "aria-label": "Search calls", value: table.search,
    oninput: (event) => { table.search = event.target.value; table.page = 0; refresh(); } });
  const filter = roles.length > 1
    ? h("select", { "aria-label": "Role", onchange: (event) => { table.role = event.target.value; table.page = 0; refresh(); } },
      h("option", { value: "" }, "all roles"), roles.map((role) => h("option", { value: role, selected: role === table.role }, role)))
    : null;
  const note = data.n_drawn < data.n_calls
    ? `The ${whole(data.n_drawn)} of ${whole(data.n_calls)} calls with the lowest ${FIRST}, the steepest fall, the worst end${SECOND ? ` and the highest ${SECOND}` : ""}.`
    : "Open one to see it utterance by utterance.";
  refresh();
  return h("section", { class: "card" }, h("h2", {}, "Calls"), h("p", { class: "note" }, note),
    h("div", { class: "tools" }, search, filter, count),
    h("div", { class: "scroll" }, h("table", {}, h("thead", {}, h("tr", {}, heads)), body)), pager);
}
