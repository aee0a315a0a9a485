// Reads the data, shows the page that the address names, keeps the theme.
const main = document.getElementById("main");

function notices() {
  return data.notices.map((notice) => h("p", { class: `notice ${notice.kind}`, role: "note" }, notice.text));
}

function show() {
  const match = /^#call=(.*)$/.exec(location.hash);
  const session = match ? decodeURIComponent(match[1]) : null;
  if (session !== null && data.curves[session]) {
    document.title = `${session} · vaemo report`;
    main.replaceChildren(...notices(), ...callPage(data, session));
  } else {
    document.title = "vaemo report";
    main.replaceChildren(...notices(), ...overviewPage(data));
  }
  window.scrollTo(0, 0);
}

const theme = document.getElementById("theme");
function paint(dark) {
  document.documentElement.dataset.theme = dark ? "dark" : "light";
  theme.setAttribute("aria-pressed", String(dark));
  theme.textContent = dark ? "Light" : "Dark";
}
theme.addEventListener("click", () => paint(document.documentElement.dataset.theme !== "dark"));
const system = window.matchMedia("(prefers-color-scheme: dark)");
system.addEventListener("change", (event) => paint(event.matches));
paint(system.matches);

document.getElementById("subtitle").textContent = `${plural(data.n_calls, "call")}, ${plural(data.overview.n_scored, COUNTED)} scored`;
document.getElementById("footer").textContent = `Made by vaemo ${data.version}. ${capital(listed(DIMENSIONS))} ${DIMENSIONS.length > 1 ? "are estimates" : "is an estimate"} from the voice, on a scale from ${data.overview.low} to ${data.overview.high}; they are no statement about a person.`;
document.querySelector(".skip").addEventListener("click", (event) => { event.preventDefault(); main.focus(); });
window.addEventListener("hashchange", () => { if (location.hash !== "#main") { show(); main.focus({ preventScroll: true }); } });
show();
