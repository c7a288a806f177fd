/** The settings: which of them are sent to the server, and what a change of them requires. */

import * as vscode from "vscode";

export const SECTION = "midfill";

interface Declared {
  tags?: string[];
}

interface Manifest {
  contributes: { configuration: [unknown, { properties: Record<string, Declared> }] };
}

export type Change = "nothing" | "tell" | "restart";

export class Configuration {
  /** Names of the server's settings, and of all settings that take effect when it starts. */
  private readonly names: string[] = [];
  private readonly atStart: string[] = ["server.command", "server.arguments"];

  constructor(manifest: unknown) {
    // The second section is generated from the server's own schema.
    const { properties } = (manifest as Manifest).contributes.configuration[1];
    for (const [key, declared] of Object.entries(properties)) {
      const name = key.slice(SECTION.length + 1);
      this.names.push(name);
      if (declared.tags?.includes("restart")) {
        this.atStart.push(name);
      }
    }
  }

  /**
   * The settings to send to the server: those that are set in the editor. The others are null, so that the
   * values in midfill's own file apply.
   */
  values(): Record<string, unknown> {
    const settings = vscode.workspace.getConfiguration(SECTION);
    return Object.fromEntries(
      this.names.map((name) => {
        const set = settings.inspect(name);
        const isSet = (set?.globalValue ?? set?.workspaceValue ?? set?.workspaceFolderValue) !== undefined;
        return [name, isSet ? settings.get(name) : null];
      }),
    );
  }

  change(event: vscode.ConfigurationChangeEvent): Change {
    const affects = (name: string) => event.affectsConfiguration(`${SECTION}.${name}`);
    if (this.atStart.some(affects)) {
      return "restart";
    }
    return this.names.some(affects) ? "tell" : "nothing";
  }

  get<T>(name: string, otherwise: T): T {
    return vscode.workspace.getConfiguration(SECTION).get(name, otherwise);
  }

  /** Changes a setting where it is set already (workspace or user), or else for the user. */
  async set(name: string, value: unknown): Promise<void> {
    const settings = vscode.workspace.getConfiguration(SECTION);
    const inWorkspace = settings.inspect(name)?.workspaceValue !== undefined;
    const target = inWorkspace ? vscode.ConfigurationTarget.Workspace : vscode.ConfigurationTarget.Global;
    await settings.update(name, value, target);
  }
}
