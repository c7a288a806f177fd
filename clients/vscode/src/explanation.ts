/** Explains the last answer: one sentence, and a page with all details. */

import * as vscode from "vscode";

import { SECTION } from "./configuration.js";
import { type Explanation, type Session } from "./session.js";

export const SCHEME = "midfill-explanation";

/** Shows explanations as read-only documents. They contain source text, so they stay in memory. */
export class Pages implements vscode.TextDocumentContentProvider {
  private readonly changed = new vscode.EventEmitter<vscode.Uri>();
  readonly onDidChange = this.changed.event;
  private text = "";

  provideTextDocumentContent(): string {
    return this.text;
  }

  async show(explanation: Explanation): Promise<void> {
    const uri = vscode.Uri.from({ scheme: SCHEME, path: "explanation.json" });
    this.text = JSON.stringify(explanation, null, 2);
    this.changed.fire(uri);
    await vscode.window.showTextDocument(uri, { preview: true });
  }
}

/** Returns a sentence of the server with the names of settings as VS Code spells them. */
export function asSettings(sentence: string): string {
  const settings = vscode.workspace.getConfiguration(SECTION);
  return sentence.replace(/`([a-z][a-z_]*)`/g, (quoted, name: string) => {
    const spelled = name.replace(/_([a-z])/g, (_, letter: string) => letter.toUpperCase());
    return settings.has(spelled) ? `${SECTION}.${spelled}` : quoted;
  });
}

export async function explainLast(session: Session, pages: Pages): Promise<void> {
  const document = vscode.window.activeTextEditor?.document.uri;
  if (document === undefined) {
    void vscode.window.showInformationMessage(
      "midfill: Open a file first. Each file has its own last suggestion.",
    );
    return;
  }
  const explanation = await session.explain(document, false);
  if (explanation === undefined) {
    void vscode.window.showInformationMessage("midfill: The server is not running.");
    return;
  }
  const { source, reason, message } = explanation;
  const nothing = source === "none" && !reason && !message;
  const what = nothing
    ? "No suggestion has been requested in this file yet."
    : // A newer server may send a reason without a sentence.
      message || (reason ? `No suggestion: ${reason}.` : `The last suggestion came from: ${source}.`);
  const offered = nothing ? [] : ["Details"];
  const chosen = await vscode.window.showInformationMessage(`midfill: ${asSettings(what)}`, ...offered);
  if (chosen === "Details") {
    const detailed = await session.explain(document, true);
    if (detailed !== undefined) {
      await pages.show(detailed);
    }
  }
}
