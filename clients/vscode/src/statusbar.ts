/** The status bar item: state of the server, details in its tooltip, the menu on a click. */

import * as vscode from "vscode";

import { type Configuration } from "./configuration.js";
import { asSettings } from "./explanation.js";
import { type ServerStatus, type Session } from "./session.js";

interface Face {
  icon: string;
  text: string;
  /** First line of the tooltip. */
  what: string;
  alarming?: boolean;
}

export class StatusBar implements vscode.Disposable {
  private readonly item: vscode.StatusBarItem;
  private readonly listeners: vscode.Disposable[];

  constructor(
    private readonly session: Session,
    private readonly configuration: Configuration,
  ) {
    this.item = vscode.window.createStatusBarItem("status", vscode.StatusBarAlignment.Right, 100);
    this.item.name = "midfill";
    this.item.command = "midfill.menu";
    const draw = () => {
      this.draw();
    };
    this.listeners = [
      session.onDidChange(draw),
      vscode.window.onDidChangeActiveTextEditor(() => {
        session.refreshStatus();
        draw();
      }),
      vscode.workspace.onDidChangeConfiguration(draw),
    ];
    this.draw();
    this.item.show();
  }

  dispose(): void {
    this.item.dispose();
    this.listeners.forEach((listener) => {
      listener.dispose();
    });
  }

  private draw(): void {
    const { icon, text, what, alarming } = this.face();
    this.item.text = `$(${icon}) ${text}`;
    this.item.accessibilityInformation = { label: `midfill: ${what}` };
    this.item.backgroundColor =
      alarming === true ? new vscode.ThemeColor("statusBarItem.errorBackground") : undefined;
    const { state } = this.session;
    const tooltip = new vscode.MarkdownString();
    tooltip.appendText(what);
    if ("status" in state) {
      tooltip.appendMarkdown(table(state.status));
    }
    this.item.tooltip = tooltip;
  }

  private face(): Face {
    const { state, snoozeEnd, work } = this.session;
    if (work !== undefined) {
      return { icon: "loading~spin", text: "midfill downloading", what: work };
    }
    switch (state.kind) {
      case "missing":
        return { icon: "warning", text: "midfill", what: "The server is not installed.", alarming: true };
      case "stopped":
        return {
          icon: "error",
          text: "midfill stopped",
          what: `The server ended: ${state.why}.`,
          alarming: true,
        };
      case "starting":
        return { icon: "loading~spin", text: "midfill", what: "The server is starting." };
      case "failed":
        if (state.status.modelMissing === true) {
          const what = `The model ${state.status.model} has not been downloaded yet. Click to download it.`;
          return { icon: "cloud-download", text: "midfill: no model", what };
        }
        return {
          icon: "error",
          text: "midfill failed",
          what: state.status.message ?? "The model could not be loaded.",
          alarming: true,
        };
      case "loading": {
        const share = state.percentage === undefined ? "" : ` ${state.percentage} %`;
        const what = `Loading the model${state.step === undefined ? "" : `: ${state.step}`}.`;
        return { icon: "loading~spin", text: `midfill${share}`, what };
      }
      case "ready":
        break;
    }
    const { enabled, model, adapter } = state.status;
    if (snoozeEnd !== undefined) {
      const until = snoozeEnd.toLocaleTimeString([], { hour: "2-digit", minute: "2-digit" });
      return { icon: "clock", text: "midfill snoozed", what: `No suggestions until ${until}.` };
    }
    if (!enabled) {
      return { icon: "circle-slash", text: "midfill off", what: "Suggestions are switched off." };
    }
    const language = vscode.window.activeTextEditor?.document.languageId;
    if (
      language !== undefined &&
      this.configuration.get<string[]>("disabledLanguages", []).includes(language)
    ) {
      const what = `Suggestions are switched off for ${language}.`;
      return { icon: "circle-slash", text: `midfill off: ${language}`, what };
    }
    const { file } = state.status;
    if (file != null) {
      return { icon: "circle-slash", text: "midfill off: this file", what: asSettings(file.message) };
    }
    const text = adapter === null ? model : `${model} + ${adapter}`;
    return { icon: "sparkle", text, what: "Suggestions appear as you type." };
  }
}

function table(status: ServerStatus): string {
  const { model, adapter, device, dtype, tokensPerSecond, version } = status;
  const rows: [string, string | null][] = [
    ["model", model],
    ["adapter", adapter],
    ["runs on", device === null ? null : `${device}, ${dtype ?? ""}`],
    ["speed", tokensPerSecond === null ? null : `${tokensPerSecond} tokens per second`],
    ["server", version],
  ];
  const lines = rows.flatMap(([name, value]) =>
    value === null ? [] : [`| ${name} | ${value.replace(/[\\|*_`<>[\]]/g, "\\$&")} |`],
  );
  return `\n\n| | |\n|---|---|\n${lines.join("\n")}`;
}
