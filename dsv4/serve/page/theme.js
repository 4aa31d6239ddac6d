// Sets the chosen colours before the first paint; a module would come too late and flash. Nothing chosen: the system's.
try {
  const theme = localStorage.getItem("dsv4.theme")?.replaceAll('"', ""); // kept as JSON, like everything else
  if (theme === "dark" || theme === "light") document.documentElement.dataset.theme = theme;
} catch (error) {
  if (!(error instanceof DOMException)) throw error; // a browser that keeps nothing: the system's colours are right
}
