(() => {
  const root = document.documentElement;
  const theme = document.getElementById("theme");
  const dark = () => root.dataset.theme
    ? root.dataset.theme === "dark"
    : matchMedia("(prefers-color-scheme: dark)").matches;
  const label = () => { theme.textContent = dark() ? "light" : "dark"; };
  theme.hidden = false;
  theme.addEventListener("click", () => {
    root.dataset.theme = dark() ? "light" : "dark";
    label();
  });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", label);
  label();
  if (!navigator.clipboard) return;  // available only if the page is served securely
  for (const button of document.querySelectorAll("button.copy")) {
    const name = button.ariaLabel;
    button.hidden = false;
    button.addEventListener("click", async () => {
      await navigator.clipboard.writeText(button.previousElementSibling.textContent);
      button.textContent = button.ariaLabel = "copied";
      setTimeout(() => { button.textContent = "copy"; button.ariaLabel = name; }, 1200);
    });
  }
})();
