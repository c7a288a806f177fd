/** The settings: which of them the server is told, and what a change of them asks for. */

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
  /** Names of the server's settings, and those of them that count only when it starts. */
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
   * What the server is told: what is set in the editor. The others are null, so that what the user has written
   * into midfill's own file counts for them.
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

  /** Sets it where it is set already, else for the user. */
  async set(name: string, value: unknown): Promise<void> {
    const settings = vscode.workspace.getConfiguration(SECTION);
    const inWorkspace = settings.inspect(name)?.workspaceValue !== undefined;
    const target = inWorkspace ? vscode.ConfigurationTarget.Workspace : vscode.ConfigurationTarget.Global;
    await settings.update(name, value, target);
  }
}
