// Reads a tlog-policy file and checkpoints as Tessera does, and tells which have the quorum.
//
//	policy POLICY CHECKPOINT...
package main

import (
	"errors"
	"fmt"
	"os"

	"github.com/transparency-dev/tessera"
)

func main() {
	if err := run(os.Args[1:]); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}

func run(arguments []string) error {
	if len(arguments) < 2 {
		return errors.New("policy POLICY CHECKPOINT...")
	}
	policy, err := os.ReadFile(arguments[0])
	if err != nil {
		return err
	}
	group, err := tessera.NewWitnessGroupFromPolicy(policy)
	if err != nil {
		return err
	}
	for _, name := range arguments[1:] {
		checkpoint, err := os.ReadFile(name)
		if err != nil {
			return err
		}
		fmt.Println(group.Satisfied(checkpoint))
	}
	return nil
}
