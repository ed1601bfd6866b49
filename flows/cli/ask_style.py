"""How the page for asking a document looks."""

STYLE = """
:root { --ink: #1f2933; --faint: #6b7785; --rule: #e3e7eb; --good: #1f7a4d; --warn: #9a6200; --bad: #b3382c; --ours: #0b6bb0; }
body { background: #f3f5f7; color: var(--ink); font: 16px/1.5 system-ui, "Segoe UI", "DejaVu Sans", sans-serif; }
.nicegui-content { padding: 0; }
.sheet {
  display: grid; grid-template: auto 1fr / minmax(0, 5fr) minmax(0, 6fr); gap: 16px;
  width: 100%; max-width: 1320px; height: 100vh; margin: 0 auto; padding: 20px 24px;
}
.sheet > header {
  grid-column: 1 / -1; display: flex; flex-wrap: wrap; align-items: baseline; gap: 0 16px; overflow-wrap: anywhere;
}
.title { font-size: 24px; font-weight: 650; letter-spacing: -.01em; }
.faint { color: var(--faint); font-size: 13px; }
.sheet > section {
  display: flex; flex-direction: column; gap: 12px; min-height: 0; padding: 18px 20px;
  background: white; border: 1px solid var(--rule); border-radius: 10px;
}
.drop { width: 100%; box-shadow: none; }
.drop .q-uploader__list, .drop .q-uploader__subtitle { display: none; }
.choices { display: flex; flex-wrap: wrap; align-items: center; gap: 4px 12px; }
.choices .q-btn { padding: 2px 10px; font-size: 13px; }
.encoding { width: 120px; margin-left: auto; }
.note {
  padding: 8px 12px; border-left: 4px solid; border-radius: 4px;
  background: #f8fafb; font-size: 14px; overflow-wrap: anywhere;
}
.good { border-color: var(--good); }
.warn { border-color: var(--warn); color: var(--warn); }
.bad { border-color: var(--bad); color: var(--bad); }
.reader { flex: 1; min-height: 0; overflow-y: auto; border-top: 1px solid var(--rule); padding-top: 10px; }
.text { white-space: pre-wrap; overflow-wrap: anywhere; font: 14px/1.6 Georgia, "DejaVu Serif", serif; }
.text, .said, .question, blockquote > div { unicode-bidi: plaintext; }
mark { background: #ffe9a8; border-radius: 3px; padding: 1px 0; }
.turns { flex: 1; min-height: 0; overflow-y: auto; display: flex; flex-direction: column; gap: 12px; }
.hint { margin: auto; color: var(--faint); text-align: center; }
.question {
  align-self: flex-end; max-width: 85%; padding: 8px 14px;
  background: var(--ours); color: white; border-radius: 14px 14px 3px 14px; overflow-wrap: anywhere;
}
.answer { align-self: flex-start; max-width: 92%; }
.said { padding: 8px 14px; background: #eef1f4; border-radius: 14px 14px 14px 3px; white-space: pre-wrap; overflow-wrap: anywhere; }
.waiting { color: var(--faint); }
blockquote {
  margin: 8px 0 0; padding: 6px 12px; border-left: 3px solid #e5b93a; background: #fffaf0; border-radius: 4px;
  font: 14px/1.5 Georgia, "DejaVu Serif", serif; cursor: pointer; overflow-wrap: anywhere;
}
.place { font: 12px/1.4 system-ui, "DejaVu Sans", sans-serif; color: var(--faint); margin-top: 3px; }
.answer > div > .faint { margin-top: 4px; font-size: 12px; }
.ask { display: flex; gap: 8px; }
.ask .q-input { flex: 1; }
@media (max-width: 820px) { .sheet { grid-template: auto / minmax(0, 1fr); height: auto; } .reader { max-height: 50vh; } }
"""
