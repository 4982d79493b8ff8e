// Before anything is drawn: the colours that the user chose ("auto" follows the system).
(() => {
  let theme = "auto";
  try {
    theme = localStorage.getItem("theme") ?? "auto";
  } catch {
    // storage is closed to us: the system's colours then
  }
  document.documentElement.dataset.theme = ["light", "dark"].includes(theme) ? theme : "auto";
})();
