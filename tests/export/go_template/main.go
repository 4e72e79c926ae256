// Fills in a Go template as Ollama's template.Execute does, for conversations given as JSON on standard input.
//
//	go run main.go <'{"template": "...", "chats": [[{"role": "user", "content": "Hi"}], ...]}'
//
// Prints a JSON list of texts. As in Ollama, .System is all system messages joined, and neighbours of one role are one.
package main

import (
	"encoding/json"
	"os"
	"strings"
	"text/template"
)

type message struct{ Role, Content string }

func main() {
	var request struct {
		Template string
		Chats    [][]message
	}
	must(json.NewDecoder(os.Stdin).Decode(&request))
	parsed, err := template.New("").Option("missingkey=zero").Parse(request.Template)
	must(err)
	var texts []string
	for _, chat := range request.Chats {
		var system []string
		var messages []*message
		for i := range chat {
			m := &chat[i]
			if m.Role == "system" {
				system = append(system, m.Content)
			}
			if n := len(messages); n > 0 && messages[n-1].Role == m.Role {
				messages[n-1].Content += "\n\n" + m.Content
			} else {
				messages = append(messages, m)
			}
		}
		var out strings.Builder
		values := map[string]any{"System": strings.Join(system, "\n\n"), "Messages": messages, "Response": ""}
		must(parsed.Execute(&out, values))
		texts = append(texts, out.String())
	}
	must(json.NewEncoder(os.Stdout).Encode(texts))
}

func must(err error) {
	if err != nil {
		panic(err)
	}
}
